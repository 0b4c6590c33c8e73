// Requests to the server: one sentence for each error, the key, waiting while it is busy.

const TRIES = 5; // of a request that a busy server refuses
const LONGEST_WAIT = 10; // seconds

/** An error with a sentence for people. `code` is the server's, "network" without an answer. */
export class ApiError extends Error {
  constructor(code, message, wait = null) {
    super(message);
    this.code = code;
    this.wait = wait;
  }
}

const hooks = { askKey: async () => null, busy: () => {} };

/** Sets `askKey(wasWrong)` -> a key or null, and `busy(message, seconds)`, called before a
 * request is repeated. */
export function configure(given) {
  Object.assign(hooks, given);
}

function storedKey() {
  try {
    return sessionStorage.getItem("groupvit-key") || memory.key;
  } catch {
    return memory.key;
  }
}

const memory = { key: null }; // where storage is blocked

function storeKey(key) {
  memory.key = key;
  try {
    sessionStorage.setItem("groupvit-key", key);
  } catch {
    // It stays in memory.
  }
}

/** Sends a request: `body` an object for JSON, or FormData. Returns the answer's JSON. */
export async function call(method, path, body, { signal, progress, isPatient } = {}) {
  for (let tries = 1; ; tries++) {
    const used = storedKey();
    try {
      return await send(method, path, body, used, signal, progress);
    } catch (error) {
      if (error.code === "key") {
        // Another request may have asked meanwhile.
        const key = storedKey() !== used ? storedKey() : await hooks.askKey(Boolean(used));
        if (!key) throw error;
        storeKey(key);
      } else if (error.wait !== null && error.wait !== undefined && (isPatient || tries < TRIES)) {
        hooks.busy(error.message, error.wait);
        await pause(error.wait * 1000, signal);
      } else throw error;
    }
  }
}

/** Tells the server that an image is not needed any more; it need not answer. */
export function forget(id) {
  const key = storedKey();
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  fetch(`v1/images/${encodeURIComponent(id)}`, { method: "DELETE", headers, keepalive: true }).catch(() => {});
}

// fetch() does not tell how much has been uploaded.
function send(method, path, body, key, signal, progress) {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) return reject(aborted());
    const request = new XMLHttpRequest();
    request.open(method, path);
    request.setRequestHeader("Accept", "application/json");
    if (key) request.setRequestHeader("Authorization", `Bearer ${key}`);
    if (progress) request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    request.onload = () => {
      const answer = parsed(request.responseText);
      if (request.status < 300 && answer) resolve(answer);
      else reject(problem(request, answer));
    };
    request.onerror = () =>
      reject(new ApiError("network", "The server does not answer: check that it runs, then try again."));
    request.onabort = () => reject(aborted());
    signal?.addEventListener("abort", () => request.abort(), { once: true });
    if (body instanceof FormData || !body) request.send(body || null);
    else {
      request.setRequestHeader("Content-Type", "application/json");
      request.send(JSON.stringify(body));
    }
  });
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function problem(request, answer) {
  const { status } = request;
  const message = answer?.error?.message || `The server answered with status ${status} and no reason.`;
  const code = status === 401 ? "key" : answer?.error?.code || String(status);
  const isBusy = status === 429 || status === 503;
  const seconds = Number(request.getResponseHeader("Retry-After")) || 1;
  return new ApiError(code, sentence(message), isBusy ? Math.min(seconds, LONGEST_WAIT) : null);
}

function sentence(text) {
  const trimmed = text.trim();
  return trimmed[0].toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}

function aborted() {
  return new DOMException("outdated", "AbortError");
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(aborted())), { once: true });
  });
}
