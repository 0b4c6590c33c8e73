// An answer of /v1/segment with its maps decoded, as far as they are needed.

import { readIndices } from "./png.js";
import { percent } from "./text.js";

export class Result {
  static async of(answer) {
    const result = new Result();
    result.answer = answer;
    [result.labels, result.scores, result.groups] = await Promise.all(
      [answer.label_map, answer.score_map, answer.group_map].map(readIndices),
    );
    result.layers = new Map();
    return result;
  }

  get names() {
    return this.answer.labels.map(({ name }) => name);
  }

  /** True if the answer has what a view shows. */
  has(view) {
    return view === "labels" || Boolean(this.answer[view === "heat" ? "similarity" : "stages"]);
  }

  /** Returns what a view draws (`Pane.draw`), decoded once. `palette`: colours of groups. */
  async layer(view, { stage, heat, palette }) {
    const key = view === "labels" ? view : `${view} ${view === "heat" ? heat : stage}`;
    if (!this.layers.has(key)) this.layers.set(key, await this.#layer(view, stage, heat, palette));
    return this.layers.get(key);
  }

  async #layer(view, stage, heat, palette) {
    const { answer } = this;
    if (view === "heat") {
      const entry = this.similarity(heat);
      return { heat: await readIndices(entry.map), entry };
    }
    if (view === "labels") {
      const entries = answer.labels.map(({ name, colour, index }) => {
        const plain = answer.has_background && index === 0;
        return { key: name, colour, plain, label: plain ? "" : name };
      });
      return { map: this.labels, entries };
    }
    const map = await readIndices(answer.stages[stage]);
    const shares = pixelShares(map.values);
    const isLast = stage === answer.stages.length - 1;
    const entries = shares.map((share, group) => {
      const label = isLast && answer.groups[group] ? answer.labels[answer.groups[group].label].name : "";
      return { key: String(group), colour: palette[group % palette.length], label: String(group), share, note: label };
    });
    return { map, entries };
  }

  /** Returns the entry of a label's heat map, the first one's if the label is not there. */
  similarity(label) {
    const { similarity } = this.answer;
    return similarity.find((each) => each.label === label) || similarity[0];
  }

  /** Returns what is at a pixel: {label, score, group, others}; others: the best scores of its group, in words. */
  at({ x, y }) {
    const i = y * this.answer.width + x;
    const group = this.groups.values[i];
    const { scores } = this.answer.groups[group] || { scores: [] };
    const best = scores.map((score, label) => ({ score, name: this.names[label] })).sort((a, b) => b.score - a.score);
    const label = this.labels.values[i];
    return {
      label: this.names[label],
      colour: this.answer.has_background && label === 0 ? null : this.answer.labels[label].colour,
      score: this.scores.values[i] / 255,
      group,
      others: best
        .filter(({ score }, rank) => !rank || score >= 0.005)
        .slice(0, 3)
        .map(({ name, score }) => `${name} ${percent(score)}`)
        .join(", "),
    };
  }
}

function pixelShares(values) {
  let most = 0;
  for (const value of values) if (value > most) most = value;
  const counts = new Array(most + 1).fill(0);
  for (const value of values) counts[value]++;
  return counts.map((each) => each / values.length);
}

/** Returns {width, height, values, count}: 1 where two results label a pixel otherwise (by name). */
export function difference(one, other) {
  const { width, height } = one.labels;
  const values = new Uint8Array(width * height);
  const numbers = other.names.map((name) => one.names.indexOf(name));
  let differing = 0;
  for (let i = 0; i < values.length; i++) {
    if (one.labels.values[i] !== numbers[other.labels.values[i]]) {
      values[i] = 1;
      differing++;
    }
  }
  return { width, height, values, count: differing };
}
