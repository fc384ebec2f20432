// Search runs in a worker, which browsers do not start for a page that is opened as a file. There, a hidden frame stands in.
// Its name is how Zensical knows that it need not load one from a network.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.waiting = [];
      this.frame = Object.assign(document.createElement("iframe"), { hidden: true, srcdoc: "<!doctype html><body>" });
      this.frame.onload = () => {
        const inside = this.frame.contentWindow;
        const script = inside.document.createElement("script");
        inside.postMessage = (data) => setTimeout(() => this.onmessage?.({ data }));
        script.src = new URL(url, document.baseURI);
        script.onerror = (event) => this.onerror?.(event);
        script.onload = () => {
          this.deliver = (data) => setTimeout(() => inside.onmessage?.({ data }));
          this.waiting.forEach(this.deliver);
        };
        inside.document.body.append(script);
      };
      (document.body ?? document.documentElement).append(this.frame);
    }

    postMessage(data) {
      this.deliver ? this.deliver(data) : this.waiting.push(data);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
