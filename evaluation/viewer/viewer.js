// The interactive viewer of a report: the truth and another volume beside it, one place and window for both.
// Volumes are int16 NIfTI with axes (W, H, D) in LPS order: the slider positions are indices (d, h, w) of that grid.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const root = document.getElementById("viewer");
  const find = (selector) => root.querySelector(selector);
  const axes = ["d", "h", "w"];
  const state = { case: 0, place: [0, 0, 0], shape: [1, 1, 1], window: data.windows[0], solid: false };

  async function voxels(id) {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(unpacked).arrayBuffer();
  }

  class NiivuePane {
    async open(canvas, onMove) {
      this.view = new niivue.Niivue({
        isRadiologicalConvention: true, sagittalNoseLeft: true, dragAndDropEnabled: false, scrollRequiresFocus: true,
        backColor: [0, 0, 0, 1], crosshairColor: [1, 0.8, 0.1, 0.7], fontColor: [1, 0.86, 0, 1], crosshairWidth: 1, crosshairWidthUnit: "mm",
        multiplanarLayout: 2, multiplanarShowRender: 0, multiplanarPadPixels: 4, isAntiAlias: false, logLevel: "error",
        loadingText: "", fontMinPx: 11, fontSizeScaling: 0.3,
      });
      await this.view.attachToCanvas(canvas);
      this.view.setRenderAzimuthElevation(200, 10);
      this.view.onLocationChange = (location) => {
        const [x, y, z] = location.frac, [D, H, W] = state.shape;
        const index = (fraction, count) => Math.min(count - 1, Math.max(0, Math.floor(fraction * count)));
        onMove([index(z, D), index(1 - y, H), index(1 - x, W)]);
      };
      return this;
    }
    async load(buffer) {
      while (this.view.volumes.length) this.view.removeVolumeByIndex(0);
      await this.view.loadFromArrayBuffer(buffer, "volume.nii");
    }
    draw() {
      const view = this.view, volume = view.volumes[0];
      if (!volume) return;
      const [low, high] = state.solid ? data.solid : state.window.range;
      if (volume.cal_min !== low || volume.cal_max !== high) {
        volume.cal_min = low;
        volume.cal_max = high;
        view.updateGLVolume();
      }
      const [d, h, w] = state.place, [D, H, W] = state.shape;
      view.scene.crosshairPos = [1 - (w + 0.5) / W, 1 - (h + 0.5) / H, (d + 0.5) / D];
      const wanted = state.solid ? view.sliceTypeRender : view.sliceTypeMultiplanar;
      if (view.opts.sliceType !== wanted) view.setSliceType(wanted);
      view.drawScene();
    }
  }

  // Where the browser has no WebGL2: the three planes on a plain canvas.
  class PlainPane {
    async open(canvas, onMove) {
      this.canvas = canvas;
      this.areas = [];
      canvas.addEventListener("pointerdown", (event) => {
        const box = canvas.getBoundingClientRect();
        const x = ((event.clientX - box.left) / box.width) * canvas.width;
        const y = ((event.clientY - box.top) / box.height) * canvas.height;
        for (const area of this.areas) {
          const u = (x - area.x) / area.width, v = (y - area.y) / area.height;
          if (u < 0 || u >= 1 || v < 0 || v >= 1) continue;
          const place = [...state.place];
          place[area.across] = Math.floor(u * state.shape[area.across]);
          const row = Math.floor(v * state.shape[area.down]);
          place[area.down] = area.down === 0 ? state.shape[0] - 1 - row : row;
          onMove(place);
        }
      });
      return this;
    }
    async load(buffer) {
      const header = new DataView(buffer);
      const dim = (n) => header.getInt16(40 + 2 * n, true), mm = (n) => header.getFloat32(76 + 4 * n, true);
      this.hu = new Int16Array(buffer, header.getFloat32(108, true));
      this.size = [dim(3), dim(2), dim(1)];
      this.spacing = [mm(3), mm(2), mm(1)];
    }
    draw() {
      if (!this.hu) return;
      const { canvas, size, spacing } = this, context = canvas.getContext("2d");
      canvas.width = canvas.clientWidth * devicePixelRatio;
      canvas.height = canvas.clientHeight * devicePixelRatio;
      const extent = size.map((count, axis) => count * spacing[axis]);
      const scale = Math.min((canvas.width - 4) / (extent[2] + extent[1]), (canvas.height - 4) / (extent[1] + extent[0]));
      const wide = extent[2] * scale + 4, high = extent[0] * scale + 4;
      // axis that is looked along, axes across and down (superior is up), place, letters left, right, top, bottom
      const views = [[1, 2, 0, 0, 0, "RLSI"], [2, 1, 0, wide, 0, "APSI"], [0, 2, 1, 0, high, "RLAP"]];
      this.areas = views.map(([axis, across, down, x, y, letters]) => {
        const width = extent[across] * scale, height = extent[down] * scale;
        context.imageSmoothingEnabled = true;
        context.drawImage(this.plane(axis, across, down), x, y, width, height);
        const at = (n) => (state.place[n] + 0.5) / size[n];
        context.strokeStyle = "rgba(255, 204, 26, 0.7)";
        context.beginPath();
        context.moveTo(x + at(across) * width, y);
        context.lineTo(x + at(across) * width, y + height);
        const row = y + (down === 0 ? 1 - at(0) : at(down)) * height;
        context.moveTo(x, row);
        context.lineTo(x + width, row);
        context.stroke();
        context.fillStyle = "#ffdc00";
        context.font = `${12 * devicePixelRatio}px sans-serif`;
        [[2, height / 2], [width - 12 * devicePixelRatio, height / 2], [width / 2, 12 * devicePixelRatio],
          [width / 2, height - 3]].forEach(([dx, dy], n) => context.fillText(letters[n], x + dx, y + dy));
        return { x, y, width, height, across, down };
      });
    }
    plane(axis, across, down) {
      const [D, H, W] = this.size, steps = [H * W, W, 1];
      const columns = this.size[across], rows = this.size[down];
      const picture = new ImageData(columns, rows), [low, high] = state.window.range;
      for (let row = 0; row < rows; row++) {
        const along = down === 0 ? D - 1 - row : row;
        for (let column = 0; column < columns; column++) {
          const hu = this.hu[state.place[axis] * steps[axis] + along * steps[down] + column * steps[across]];
          const grey = ((hu - low) / (high - low)) * 255;
          picture.data.set([grey, grey, grey, 255], 4 * (row * columns + column));
        }
      }
      const sheet = document.createElement("canvas");
      sheet.width = columns;
      sheet.height = rows;
      sheet.getContext("2d").putImageData(picture, 0, 0);
      return sheet;
    }
  }

  function sliders() {
    axes.forEach((axis, n) => {
      const slider = find(`#place-${axis}`);
      slider.max = state.shape[n] - 1;
      slider.value = state.place[n];
      find(`#shown-${axis}`).textContent = `${state.place[n] + 1} / ${state.shape[n]}`;
    });
  }

  async function start() {
    const webgl = Boolean(document.createElement("canvas").getContext("webgl2"));
    const panes = [];
    const redraw = () => { sliders(); panes.forEach((pane) => pane.draw()); };
    const move = (place) => {
      if (place.some((at, n) => at !== state.place[n])) { state.place = place; redraw(); }
    };
    for (const canvas of root.querySelectorAll("canvas")) {
      panes.push(await (webgl ? new NiivuePane() : new PlainPane()).open(canvas, move));
    }
    if (!webgl) {
      find("#viewer-note").textContent = "This browser has no WebGL2: plain slices instead of NiiVue.";
      find("#solid").disabled = true;
    }
    const other = find("#other"), names = find("#case");
    const fill = (select, labels) => select.replaceChildren(...labels.map((text, n) => new Option(text, n)));
    async function show(keepPlace) {
      const volumes = data.cases[state.case].volumes;
      state.shape = volumes[0].shape;
      if (!keepPlace) state.place = state.shape.map((count) => Math.floor(count / 2));
      const chosen = [volumes[0], volumes[Number(other.value)]];
      for (let n = 0; n < panes.length; n++) await panes[n].load(await voxels(chosen[n].id));
      redraw();
    }
    async function change() {
      state.case = Number(names.value);
      fill(other, data.cases[state.case].volumes.map((volume) => volume.label));
      other.value = data.cases[state.case].volumes.length - 1;
      await show(false);
    }
    axes.forEach((axis, n) => find(`#place-${axis}`).addEventListener("input", (event) => {
      move(state.place.map((at, m) => (m === n ? Number(event.target.value) : at)));
    }));
    const presets = data.windows.map((preset) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = preset.name;
      button.title = `level ${preset.level} HU, width ${preset.width} HU`;
      button.addEventListener("click", () => {
        state.window = preset;
        presets.forEach((one, m) => one.setAttribute("aria-pressed", String(data.windows[m] === preset)));
        redraw();
      });
      button.setAttribute("aria-pressed", String(preset === state.window));
      return button;
    });
    find("#presets").append(...presets);
    find("#solid").addEventListener("change", (event) => { state.solid = event.target.checked; redraw(); });
    // one after the other: a second choice may come while the first still loads
    let busy = Promise.resolve();
    const later = (work) => { busy = busy.then(work).catch(failed); };
    names.addEventListener("change", () => later(change));
    other.addEventListener("change", () => later(() => show(true)));
    addEventListener("resize", () => panes.forEach((pane) => pane.draw()));
    fill(names, data.cases.map((one) => one.name));
    await change();
    root.dataset.state = webgl ? "niivue" : "plain";
  }

  function failed(error) {
    root.dataset.state = "failed";
    find("#viewer-note").textContent = `The viewer has failed: ${error.message}`;
  }

  start().catch(failed);
})();
