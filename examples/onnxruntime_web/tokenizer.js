// CLIP's byte-pair tokenizer, from a tokenizer.json, and the labels that people type.

// What Unicode calls white space; JavaScript's own \s differs by two characters.
const SPACE = /[\t-\r \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/gu;
const WORD = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^ \p{L}\p{N}]+/gu;

// Each byte as a character that can be seen: printable Latin-1 as it is, the others from 256 on, in order.
function byteCharacters() {
  const printable = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(printable(byte) ? byte : next++));
}

export class Tokenizer {
  // content: of tokenizer.json. maxTokens: of a text, its beginning and its end included.
  constructor(content, maxTokens) {
    const { vocab, merges, end_of_word_suffix: suffix } = content.model;
    this.vocab = new Map(Object.entries(vocab));
    for (const token of content.added_tokens) this.vocab.set(token.content, token.id);
    this.added = new Set(content.added_tokens.map((token) => token.content));
    this.ranks = new Map(merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
    this.suffix = suffix ?? "";
    [this.start, this.end] = [content.post_processor.cls[1], content.post_processor.sep[1]];
    this.maxTokens = maxTokens;
    this.characters = byteCharacters();
  }

  // The tokens of a text, without its beginning and its end.
  tokens(text) {
    // Letter by letter: JavaScript writes a capital sigma at the end of a word in another way.
    const lower = Array.from(text.normalize("NFC").replace(SPACE, " "), (each) => each.toLowerCase()).join("");
    return (lower.match(WORD) ?? []).flatMap((word) => (this.added.has(word) ? this.vocab.get(word) : this.merged(word)));
  }

  // The tokens of a text as the model reads it.
  encode(text) {
    return [this.start, ...this.tokens(text).slice(0, this.maxTokens - 2), this.end];
  }

  // Texts as the text encoder's inputs, padded on the right.
  batch(texts) {
    const rows = texts.map((text) => this.encode(text));
    const length = Math.max(...rows.map((row) => row.length));
    const ids = new BigInt64Array(rows.length * length).fill(BigInt(this.end));
    const mask = new BigInt64Array(rows.length * length);
    rows.forEach((row, r) => row.forEach((id, t) => ([ids[r * length + t], mask[r * length + t]] = [BigInt(id), 1n])));
    return { ids, mask, shape: [rows.length, length], rows };
  }

  // The pair that was learned first is merged, everywhere in the word, until no pair is left.
  merged(word) {
    let parts = Array.from(new TextEncoder().encode(word), (byte) => this.characters[byte]);
    parts[parts.length - 1] += this.suffix;
    while (parts.length > 1) {
      const ranks = parts.slice(1).map((part, i) => this.ranks.get(`${parts[i]} ${part}`) ?? Infinity);
      const best = Math.min(...ranks);
      if (best === Infinity) break;
      const joined = [];
      for (let i = 0; i < parts.length; i++) joined.push(ranks[i] === best ? parts[i] + parts[++i] : parts[i]);
      parts = joined;
    }
    return parts.map((part) => this.vocab.get(part) ?? this.end);
  }
}

// "cat, couch | sofa" -> [["cat"], ["couch", "sofa"]]: of each label its words, the first of which is its name.
export function parseLabels(text) {
  if (text.includes('"')) throw new Error('Definitions in quotes (") are for Python: leave the quotes out.');
  return text
    .split(/[,，、،;；\n]/u)
    .map((label) => label.split(/[|｜]/u).map((word) => word.trim()).filter(Boolean))
    .filter((words) => words.length);
}

export function checkDifferent(labels) {
  const seen = new Set();
  for (const word of labels.flat().map((each) => each.normalize("NFC").toLowerCase())) {
    if (seen.has(word)) throw new Error(`The label “${word}” is there twice: leave one of them out.`);
    seen.add(word);
  }
}
