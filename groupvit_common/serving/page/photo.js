// An image that the server has encoded, once for each backend that is shown.

import { call, forget } from "./api.js";

export class Photo {
  constructor(blob, name) {
    Object.assign(this, { blob, name, bitmap: null, width: 0, height: 0, encoded: 0 });
    this.ids = new Map(); // backend -> promise of the image's id there
    this.controller = new AbortController();
  }

  /** Sends the image to a backend, unless it is there or on its way. `progress(part)`: how much is sent, 0 to 1. */
  send(backend, progress) {
    if (!this.ids.has(backend)) {
      const id = this.#upload(backend, progress);
      this.ids.set(backend, id);
      id.catch(() => this.ids.get(backend) === id && this.ids.delete(backend));
    }
    return this.ids.get(backend);
  }

  async #upload(backend, progress) {
    const form = new FormData();
    form.append("image", this.blob, this.name);
    form.append("backend", backend);
    const answer = await call("POST", "v1/images", form, { signal: this.controller.signal, progress });
    Object.assign(this, { width: answer.width, height: answer.height, encoded: answer.milliseconds?.encode ?? 0 });
    return answer.image_id;
  }

  /** Asks for the labels of the image. The server keeps images for a while; one that is gone is sent again. */
  async segment(backend, request, { signal, progress }) {
    for (let tries = 1; ; tries++) {
      const sent = this.send(backend, progress);
      const fields = { image_id: await sent, backend, ...request };
      try {
        return await call("POST", "v1/segment", fields, { signal });
      } catch (error) {
        if (error.code !== "image_gone" || tries > 1) throw error;
        if (this.ids.get(backend) === sent) this.ids.delete(backend);
      }
    }
  }

  /** Tells the server that its copies are not needed any more. */
  release() {
    for (const id of this.ids.values()) id.then(forget, () => {});
  }

  /** Gives the image up. */
  close() {
    this.release();
    this.controller.abort();
    this.bitmap?.close();
  }
}
