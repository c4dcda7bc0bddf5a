// A clip that is still being written, in a <video>: the fragmented mp4 arrives as one long response
// and goes into a SourceBuffer piece by piece (Media Source Extensions, W3C).

const KEPT_BEHIND = 30; // seconds before the playhead that stay when a browser's memory is full

/** Whether this browser can play a clip while it grows. */
export const canGrow = () => "MediaSource" in window;

/** The page may not play what a script hands over (its Content Security Policy): try the address. */
export class Refused extends Error {}

/**
 * The type of an mp4 as `isTypeSupported` wants it, or null while its header is not whole.
 * @param {Uint8Array} bytes its first bytes
 */
export function typeOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = 0; at + 8 <= bytes.length; at += Math.max(8, view.getUint32(at))) {
    if (nameAt(bytes, at + 4) !== "moov") continue;
    const end = at + view.getUint32(at);
    if (end > bytes.length) return null;
    const codecs = [];
    for (let i = at; i + 8 < end; i++) {
      const name = nameAt(bytes, i);
      // ISO/IEC 14496-15: profile, constraints and level of H.264 follow a version byte.
      if (name === "avcC") codecs.push("avc1." + hex(bytes.subarray(i + 5, i + 8)));
      if (name === "mp4v") codecs.push("mp4v.20.9");
      if (name === "esds" && codecs.at(-1) !== "mp4v.20.9") codecs.push("mp4a.40.2");
    }
    return `video/mp4; codecs="${codecs.join(", ")}"`;
  }
  return null;
}

/**
 * Play `url` in `video` from its start, as it grows; resolves when all of it is there.
 *
 * Rejects where this browser cannot play it, or the server is gone. Whether parts were let go
 * because the browser's memory was full is told by the result.
 * @param {HTMLVideoElement} video
 * @param {() => Promise<Response>} open asks for the clip
 * @param {AbortSignal} signal ends it
 * @param {() => void} more told whenever more of it can be played
 * @returns {Promise<{trimmed: boolean}>}
 */
export async function grow(video, open, signal, more) {
  const response = await open();
  if (!response.ok) throw new Error(await response.text());
  const reader = response.body.getReader();
  signal.addEventListener("abort", () => reader.cancel().catch(() => {}));
  let head = new Uint8Array();
  let type = null;
  while (!type) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the clip ended before it began");
    head = joined(head, value);
    type = typeOf(head);
  }
  if (!MediaSource.isTypeSupported(type)) {
    await reader.cancel();
    throw new Error(`this browser does not play ${type}`);
  }
  const source = new MediaSource();
  const address = URL.createObjectURL(source);
  video.src = address;
  try {
    await once(source, "sourceopen", signal, video);
  } catch (error) {
    await reader.cancel();
    throw signal.aborted ? error : new Refused(error.message);
  } finally {
    URL.revokeObjectURL(address);
  }
  const buffer = source.addSourceBuffer(type);
  let trimmed = false;
  for (let piece = head; piece; piece = await next(reader)) {
    while (!(await append(buffer, piece, signal))) {
      trimmed = (await forget(buffer, video.currentTime - KEPT_BEHIND, signal)) || trimmed;
    }
    more();
  }
  if (source.readyState === "open") source.endOfStream();
  return { trimmed };
}

async function next(reader) {
  const { value, done } = await reader.read();
  return done ? null : value;
}

async function append(buffer, piece, signal) {
  try {
    buffer.appendBuffer(piece);
  } catch (error) {
    if (error.name === "QuotaExceededError") return false;
    throw error;
  }
  await once(buffer, "updateend", signal);
  return true;
}

/** Make room; waits where nothing can be let go of yet. */
async function forget(buffer, until, signal) {
  const start = buffer.buffered.length ? buffer.buffered.start(0) : 0;
  if (until <= start + 1) {
    await new Promise((done) => setTimeout(done, 500));
    signal.throwIfAborted();
    return false;
  }
  buffer.remove(start, until);
  await once(buffer, "updateend", signal);
  return true;
}

function once(target, event, signal, failing = target) {
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const fail = () => reject(new Error(failing.error?.message ?? "the clip cannot be decoded"));
    target.addEventListener(event, resolve, { once: true });
    failing.addEventListener("error", fail, { once: true });
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}

function joined(one, other) {
  const both = new Uint8Array(one.length + other.length);
  both.set(one);
  both.set(other, one.length);
  return both;
}

const nameAt = (bytes, at) => String.fromCharCode(...bytes.subarray(at, at + 4));
const hex = (bytes) => [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
