// Requests to the server. Actions go one after another, and are sent again until the server has answered.

export class Problem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // 0: no answer
  }
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Problem(0, "The server does not answer.");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Problem(response.status, body.error ?? `The server answered ${response.status}.`);
  }
  return response;
}

export const get = async (path) => (await request(path)).json();

export const getVoxels = async (path, Type) => new Type(await (await request(path)).arrayBuffer());

export const post = async (path, body, keepalive = false) =>
  (await request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    keepalive,
  })).json();

// Resolves when the server has closed the case, or does not answer. Also while the page is left.
export const close = (name, session) => post("api/close", { case: name, session }, true).catch(() => {});

const newId = () => Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");

// The actions of one session on one case.
export class ActionQueue {
  constructor(caseName, session, { onState, onStatus, onProblem }) {
    Object.assign(this, { caseName, session, onState, onStatus, onProblem });
    this.waiting = [];
    this.running = null; // until all is sent
    this.ended = false;
    this.lost = null; // why nothing is saved from this window any more
  }

  send(action) {
    if (this.lost) return this.onProblem(this.lost, 0);
    if (this.ended) return;
    this.waiting.push({ id: newId(), ...action });
    this.onStatus("saving");
    this.run();
  }

  // Resolves when nothing waits any more.
  run() {
    this.running ??= this.sendAll().finally(() => (this.running = null));
    return this.running;
  }

  async sendAll() {
    while (this.waiting.length) {
      try {
        const action = this.waiting[0];
        const state = await post("api/act", { case: this.caseName, session: this.session, action });
        this.waiting.shift();
        this.onStatus(this.waiting.length ? "saving" : "saved");
        this.onState(state, this.waiting.length === 0, action);
      } catch (problem) {
        if (problem.status === 0 || problem.status >= 500) {
          this.onStatus("unsaved", problem.message);
          await new Promise((resolve) => setTimeout(resolve, 1000));
        } else {
          const lost = this.waiting.length;
          this.waiting = [];
          if ([403, 409].includes(problem.status)) this.lost = problem;
          this.onStatus(this.lost ? "lost" : "saved");
          this.onProblem(problem, lost);
        }
      }
    }
  }

  // What still waits is given up.
  end() {
    this.ended = true;
    this.waiting = [];
    return close(this.caseName, this.session);
  }
}
