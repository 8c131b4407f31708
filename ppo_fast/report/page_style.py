"""The style sheet of the report: system fonts, one accent, light and dark, one column on a phone."""

CSS = """
:root {
  --paper: #fbfbfa; --card: #ffffff; --ink: #1f2328; --soft: #5b636d; --line: #e1e4e8;
  --accent: #2a6fb0; --warn-ink: #7a4300; --warn-paper: #fff4e0; --warn-line: #e6b566;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1c2026; --ink: #e4e7eb; --soft: #9aa4b0; --line: #2f363f;
    --accent: #6fb1ee; --warn-ink: #f5d7a1; --warn-paper: #33280f; --warn-line: #8a6a26;
  }
  figure { filter: brightness(.9); }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .8rem; font-size: 1.2rem; }
h3 { margin: 1.4rem 0 .6rem; font-size: 1rem; color: var(--soft); font-weight: 600; }
p, ul { max-width: 46rem; }
.soft { color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem; }
.tile, figure, .sample, .box { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: .7rem .9rem; }
.tile .label { color: var(--soft); font-size: .85rem; }
.tile .value { font-size: 1.15rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile .value .from { color: var(--soft); font-weight: 400; }
.warnings { margin: 1.2rem 0; padding: .8rem 1rem .8rem 2.2rem; max-width: none;
  background: var(--warn-paper); color: var(--warn-ink); border: 1px solid var(--warn-line);
  border-radius: 10px; }
.warnings li + li { margin-top: .5rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .8rem;
  align-items: start; }
figure { margin: 0; padding: .5rem; background: #ffffff; }
figure img { display: block; width: 100%; height: auto; }
.sample { margin-bottom: .8rem; padding: .9rem 1rem; }
.prompt { margin: 0 0 .7rem; color: var(--soft); }
.prompt, .answer p { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-width: none; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.answer { border-left: 3px solid var(--line); padding-left: .8rem; min-width: 0; }
.answer.after { border-color: var(--accent); }
.answer p { margin: .15rem 0 .4rem; }
.answer .when { font-size: .8rem; font-weight: 600; color: var(--soft); text-transform: uppercase;
  letter-spacing: .04em; }
.bar { display: flex; height: 1.1rem; border-radius: 6px; overflow: hidden; margin-bottom: .8rem; }
.bar span { display: block; }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: 3px; margin-right: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
code, pre { font: .86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.box { padding: .9rem 1rem; overflow-x: auto; }
pre { margin: 0; }
summary { cursor: pointer; color: var(--accent); }
details > *:not(summary) { margin-top: .8rem; }
@media (max-width: 40rem) { .answers { grid-template-columns: 1fr; } }
"""
