// What a sampling node shows of its run: the clip with its sound while more of it is made, what is
// known of the run, a line for what happens next, and Stop.

import { canGrow, grow, Refused } from "./growing_clip.js";
import { said } from "./words.js";

const AT_LEAST = 0.5; // seconds that lie ready before it plays
const AT_MOST = 4.0; // the same after many interruptions
const AT_MOST_ENDLESS = 2.0; // no more than three are made ahead there
// The next piece may take so many times as long to come as the last ones: to begin, and where a typed
// line is waited for.
const TO_BEGIN = 2;
const TO_JUMP = 1.3;
const LAST = 4; // pieces that say how long one takes
const SAID_EVERY = 400; // milliseconds between two words on where it is, while there is no end
const VOLUME = "mutual_forcing.volume";
const STYLE = `
.mf-player { display: flex; flex-direction: column; gap: 4px; height: 100%; font: 12px sans-serif;
  color: var(--input-text, #ddd); box-sizing: border-box; overflow: hidden; }
.mf-player video { flex: 1 1 auto; min-height: 0; width: 100%; background: #000; border-radius: 4px;
  object-fit: contain; }
.mf-player p, .mf-player ul { margin: 0; padding: 0; list-style: none; }
.mf-player ul { flex: none; max-height: 5em; overflow-y: auto; }
.mf-player form { display: flex; gap: 4px; }
.mf-player input { flex: 1 1 auto; min-width: 0; }
.mf-player input, .mf-player button { font: inherit; padding: 3px 6px; border-radius: 4px;
  color: inherit; background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #555); }
.mf-player :focus-visible { outline: 2px solid #4a9eff; outline-offset: 1px; }
.mf-player :disabled { opacity: 0.5; }
.mf-player [hidden] { display: none !important; }`;

const players = new Set();

/** The panel of one node. */
export class Player {
  /**
   * @param server ComfyUI's `api`: `fetchApi(path, options)` and `apiURL(path)`
   */
  constructor(server) {
    this.server = server;
    this.status = null;
    /** What a test or a curious artist may read: times of `performance.now()`. */
    this.numbers = {};
    this.element = this.build();
    players.add(this);
    this.timers = [setInterval(() => this.look(), 100), setInterval(() => this.describe(), 500)];
  }

  /** Show what is known of a run; another run begins anew. */
  show(status) {
    const isNew = this.status?.prompt_id !== status.prompt_id;
    this.status = status;
    if (isNew) this.begin();
    if (status.plays && !this.playing && canGrow()) this.play();
    if (status.made > this.made) {
      this.made = status.made;
      this.since = performance.now();
      this.came = [...this.came, status.took].slice(-LAST - 1);
    }
    for (const [second, line] of status.followed.slice(this.followed)) {
      this.jump = second;
      this.say(said("From {0} on: {1}", seconds(second), line));
      const typed = this.numbers.lines.find((one) => one.line === line && !("second" in one));
      if (typed) Object.assign(typed, { second, told: performance.now() });
    }
    this.followed = status.followed.length;
    this.words.replaceChildren(...status.words.map((text) => tag("li", { textContent: text })));
    for (const part of [this.line, this.send, this.stop]) part.disabled = status.over;
    if (status.stop_asked) this.stop.disabled = true;
    this.describe();
  }

  /** Let go of everything. */
  close() {
    for (const timer of this.timers) clearInterval(timer);
    players.delete(this);
    this.ending?.abort();
    this.unload();
  }

  unload() {
    this.video.hidden = true;
    this.video.removeAttribute("src");
    this.video.load();
  }

  build() {
    if (!document.getElementById("mf-player-style")) {
      document.head.append(tag("style", { id: "mf-player-style", textContent: STYLE }));
    }
    this.video = tag("video", { controls: true, playsInline: true, hidden: true });
    this.video.setAttribute("aria-label", said("The clip, while it is made"));
    this.facts = tag("p", {});
    this.words = tag("ul", {});
    this.said = tag("p", { hidden: true });
    for (const part of [this.words, this.said]) part.setAttribute("role", "status");
    this.line = tag("input", { type: "text", placeholder: said("What happens next"), maxLength: 2000 });
    this.line.setAttribute("aria-label", this.line.placeholder);
    this.send = tag("button", { type: "submit", textContent: said("Send") });
    this.send.title = said("From the next second on");
    this.stop = tag("button", { type: "button", textContent: said("Stop") });
    this.stop.title = said(
      "Finish this second and go on with what there is. Cancel ends the whole run.",
    );
    const form = tag("form", {});
    form.append(this.line, this.send, this.stop);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.sendLine();
    });
    this.stop.addEventListener("click", () => this.post("stop", {}));
    const element = tag("div", { className: "mf-player" });
    element.append(this.video, this.facts, this.words, this.said, form);
    // Keys that are typed here are not the graph's.
    for (const kind of ["keydown", "keyup", "keypress", "paste"]) {
      element.addEventListener(kind, (event) => event.stopPropagation());
    }
    this.listen();
    return element;
  }

  listen() {
    const { video } = this;
    video.addEventListener("volumechange", () => {
      if (!this.forced) localStorage.setItem(VOLUME, JSON.stringify([video.volume, video.muted]));
      this.forced = false;
    });
    video.addEventListener("play", () => (this.wanted = true));
    video.addEventListener("pause", () => {
      // At its end a video pauses as well.
      if (!this.holding && !video.ended) this.wanted = false;
    });
    video.addEventListener("waiting", () => this.ranDry());
  }

  begin() {
    this.ending?.abort();
    this.playing = this.holding = this.started = false;
    this.saidAt = -Infinity;
    this.wanted = !this.status.over; // an older clip waits to be asked
    this.jump = null;
    this.followed = this.status.followed.length;
    this.made = 0;
    this.since = performance.now(); // when more was made
    this.came = []; // when the last pieces were made, in seconds of the run
    this.numbers = { begun: performance.now(), underruns: [], waited: 0, ahead: [], lines: [] };
    this.unload();
    this.say("");
  }

  async play() {
    const { video, numbers } = this;
    this.playing = true;
    this.ending = new AbortController();
    const { signal } = this.ending;
    const clip = `${this.place}/clip.mp4`;
    [video.volume, video.muted] = JSON.parse(localStorage.getItem(VOLUME) ?? "[1, false]");
    const shown = () => (numbers.firstPicture ??= performance.now());
    video.requestVideoFrameCallback?.(shown) ??
      video.addEventListener("loadeddata", shown, { once: true });
    const ask = () => this.server.fetchApi(clip, { signal });
    if (this.status.over) {
      video.src = this.server.apiURL(clip);
      return;
    }
    try {
      const { trimmed } = await grow(video, ask, signal, () => this.look()).catch((error) => {
        if (!(error instanceof Refused)) throw error;
        video.src = this.server.apiURL(clip); // without going back behind what is buffered
        return { trimmed: true };
      });
      if (trimmed || this.status.preview) await this.whole(clip, signal);
    } catch (error) {
      // Pictures go on beside the node, and this stays out of their way.
      if (!signal.aborted) {
        this.unload();
        this.say(error.message);
      }
    }
  }

  /** At its end, take the file, where a browser can go anywhere, and which is no preview. */
  async whole(clip, signal) {
    const { video } = this;
    await new Promise((done) => {
      video.addEventListener("ended", done, { once: true });
      signal.addEventListener("abort", done, { once: true });
    });
    if (!signal.aborted) video.src = this.server.apiURL(clip);
  }

  /** Seconds that must lie ready for the next ones to come in time. */
  enough(slack) {
    const usual = (this.came.at(-1) - this.came[0]) / (this.came.length - 1) || 0;
    const over = (performance.now() - this.since) / 1000;
    const most = this.status?.asked === null ? AT_MOST_ENDLESS : AT_MOST;
    return Math.min(most, Math.max(AT_LEAST, slack * usual - over));
  }

  /**
   * Whenever more is there, and ten times a second: begin, go on after an interruption, jump to
   * what was typed.
   */
  look() {
    const { video, numbers } = this;
    if (!this.playing || !video.buffered.length) return;
    video.hidden = false;
    const end = video.buffered.end(video.buffered.length - 1);
    const ahead = end - video.currentTime;
    if (this.started && !this.status.over) numbers.ahead.push([performance.now(), ahead]);
    let enough = ahead >= this.enough(TO_BEGIN * (1 + numbers.underruns.length));
    if (this.jump !== null) {
      const there = Math.max(video.currentTime, this.jump);
      if (end - there >= this.enough(TO_JUMP) || this.status.over) {
        if (there > video.currentTime) video.currentTime = there;
        this.jump = null;
        enough = true;
      }
    }
    if ((enough || this.status.over) && this.wanted && this.isTurn()) {
      if (this.holding) numbers.waited += performance.now() - this.holding;
      if (this.holding || !this.started) this.start();
    }
    for (const line of numbers.lines)
      if (end > line.second + AT_LEAST) line.came ??= performance.now();
    this.note();
    this.sayPlace();
  }

  /** Where it is, so that a clip without an end is made no further ahead than it must be. */
  sayPlace() {
    const { status, video } = this;
    const now = performance.now();
    if (!this.started || status.over || status.asked !== null || now - this.saidAt < SAID_EVERY)
      return;
    this.saidAt = now;
    this.post("played", { second: video.currentTime }).catch(() => {}); // it says so again
  }

  /** When what was first heard. */
  note() {
    const { video, numbers } = this;
    if (!video.currentTime || video.paused || video.muted || !video.volume) return;
    numbers.firstSound ??= performance.now();
    for (const line of numbers.lines)
      if (video.currentTime >= line.second) line.heard ??= performance.now();
  }

  /** One clip after the other: chunks of one graph follow one another. */
  isTurn() {
    if (this.started) return true;
    return ![...players].some((other) => other !== this && other.isHeard());
  }

  isHeard() {
    const { video } = this;
    return this.started && this.wanted && !video.ended && (!video.paused || Boolean(this.holding));
  }

  async start() {
    this.started = true;
    this.holding = false;
    try {
      await this.video.play();
    } catch (error) {
      if (error.name !== "NotAllowedError") return;
      // A page that nobody has clicked yet may not make a sound.
      this.forced = this.video.muted = true;
      this.say(said("Muted until you click: this page was not touched yet"));
      await this.video.play().catch(() => {});
    }
  }

  ranDry() {
    const { video, status, numbers } = this;
    const end = video.buffered.length ? video.buffered.end(video.buffered.length - 1) : 0;
    if (!this.started || video.seeking || status.over || end - video.currentTime > 0.2) return;
    numbers.underruns.push(performance.now());
    this.holding = performance.now();
    video.pause();
  }

  describe() {
    const { status, video } = this;
    if (!status) return;
    const speed = status.took > 0 ? status.made / status.took : 0;
    const facts = [
      status.asked === null
        ? said("{0} made", seconds(status.made))
        : said("{0} of {1} made", seconds(status.made), seconds(status.asked)),
    ];
    if (status.made) facts.push(said("{0} × real time", speed.toFixed(1)));
    if (!status.over && status.asked !== null && speed > 0) {
      facts.push(said("{0} left", seconds(Math.max(0, status.asked - status.made) / speed)));
    }
    if (!status.over && status.preview && this.started) facts.push(said("preview"));
    if (!status.over && video.buffered.length) {
      const end = video.buffered.end(video.buffered.length - 1);
      facts.push(said("{0} ready to play", seconds(Math.max(0, end - video.currentTime))));
    }
    const whole = status.asked !== null && status.made > status.asked - 0.1; // sums are rounded
    const end = status.stop_asked ? "stopped" : whole ? "done" : "broken off";
    if (status.over) facts.push(said(end));
    else if (status.stop_asked) facts.push(said("stopping"));
    else if (this.holding) facts.push(said("waiting for more"));
    const text = facts.join(" · ");
    if (this.facts.textContent !== text) this.facts.textContent = text;
  }

  async sendLine() {
    const line = this.line.value.trim().split(/\s+/).join(" ");
    if (!line) return;
    const typed = { line, sent: performance.now() };
    const { lines } = this.numbers;
    lines.push(typed);
    if (!(await this.post("line", { line }))) lines.splice(lines.indexOf(typed), 1);
    else {
      this.line.value = "";
      if (!("second" in typed)) this.say(said("Sent: {0}", line));
    }
  }

  get place() {
    const { prompt_id, node_id } = this.status;
    return `/mutual_forcing/live/${encodeURIComponent(prompt_id)}/${encodeURIComponent(node_id)}`;
  }

  async post(what, body) {
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", headers, body: JSON.stringify(body) };
    const answer = await this.server.fetchApi(`${this.place}/${what}`, options);
    if (!answer.ok) this.say(await answer.text());
    return answer.ok;
  }

  say(text) {
    this.said.textContent = text;
    this.said.hidden = !text;
  }
}

const seconds = (number) => `${number.toFixed(number < 10 ? 1 : 0)} s`;
const tag = (name, properties) => Object.assign(document.createElement(name), properties);
