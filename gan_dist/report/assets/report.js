"use strict";
// One slider moves every film on the page: each shows its picture at that share of its own training.
for (const reel of document.querySelectorAll(".reel")) {
  const slider = reel.querySelector("input");
  const output = reel.querySelector("output");
  const button = reel.querySelector("button");
  const films = [...document.querySelectorAll("[data-film]")].map((figure) => ({
    image: figure.querySelector("img"),
    label: figure.querySelector("[data-step]"),
    frames: JSON.parse(document.getElementById(figure.dataset.film).textContent),
  }));
  const show = () => {
    const share = slider.max > 0 ? slider.value / slider.max : 1;
    films.forEach((film, number) => {
      const frame = film.frames[Math.round(share * (film.frames.length - 1))];
      film.image.src = frame.src;
      film.image.alt = `Samples of the fixed latents at step ${frame.step}`;
      if (film.label) film.label.textContent = `step ${frame.step.toLocaleString("en")}`;
      if (number === 0 && output) {
        output.textContent = films.length > 1 ? `${Math.round(share * 100)}%` : `step ${frame.step.toLocaleString("en")}`;
        slider.setAttribute("aria-valuetext", output.textContent);
      }
    });
  };
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  slider.addEventListener("input", () => { stop(); show(); });
  button.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (slider.value === slider.max) slider.value = 0;
    button.textContent = "Pause";
    show();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (slider.value === slider.max) stop();
    }, 160);
  });
}
const short = (y) => (Math.abs(y) >= 1000 ? Math.round(y).toLocaleString("en") : String(Number(y.toPrecision(4))));
for (const plot of document.querySelectorAll(".plot[data-chart]")) {
  const chart = JSON.parse(plot.dataset.chart);
  const hair = plot.querySelector(".hair");
  const tip = plot.querySelector(".tip");
  const nearest = (points, x) => points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best));
  const point = (share) => {
    const wanted = chart.left + share * (chart.right - chart.left);
    const x = nearest(chart.series[0].points, wanted)[0];
    const at = (x - chart.left) / (chart.right - chart.left);
    hair.style.left = `${at * 100}%`;
    tip.replaceChildren(`${chart.x} ${short(x)}`);
    chart.series.forEach((series, number) => {
      const dot = document.createElement("i");
      dot.className = `s${number % 6}`;
      tip.append(document.createElement("br"), dot, `${series.name} ${short(nearest(series.points, x)[1])}`);
    });
    hair.hidden = tip.hidden = false;
    const room = plot.clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, at * plot.clientWidth + (at > 0.5 ? -tip.offsetWidth - 10 : 10)))}px`;
  };
  const hide = () => { hair.hidden = tip.hidden = true; };
  let share = 1;
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    point((share = Math.max(0, Math.min(1, (event.clientX - box.left) / box.width))));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
    if (move) { event.preventDefault(); point((share = Math.max(0, Math.min(1, share + move)))); }
  });
}
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("pre").textContent;
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { button.textContent = "Select it"; }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
