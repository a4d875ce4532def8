"""The style sheet of the report."""

STYLE = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1c1f23;--soft:#5b636d;--line:#dfe3e8;--card:#f6f7f9;
--pass:#1a7f4b;--warn:#946200;--fail:#c0392b;--unknown:#5b636d;--link:#0b62a8}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:2rem 1.25rem 4rem;max-width:68rem;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
body.several{max-width:112rem}
h1{font-size:1.7rem;line-height:1.2;margin:0}
h2{font-size:1.2rem;margin:0 0 .2rem}
h3{font-size:1rem;margin:0 0 .5rem}
p{margin:.4rem 0}
a{color:var(--link)}
.subtitle,.good,.note,footer,figcaption{color:var(--soft)}
.subtitle{margin:.25rem 0 .75rem}
.good{max-width:46rem;margin:0 0 .8rem}
.note,figcaption,footer{font-size:.875rem}
.text{white-space:pre-wrap}
nav{display:flex;flex-wrap:wrap;gap:.15rem 1rem;font-size:.875rem}
section{margin-top:2rem;padding-top:1.25rem;border-top:1px solid var(--line)}
.cells{display:grid;gap:1.5rem 2rem;grid-template-columns:minmax(0,1fr)}
.several .cells{grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
.cell{min-width:0}
.figures{display:grid;gap:1rem 1.25rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,17.5rem),1fr));
margin:.5rem 0}
figure{margin:0;min-width:0}
figure svg,figure img{display:block;width:100%;height:auto;max-width:28rem}
figure img{background:#fff;border-radius:4px}
figure svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
figcaption{margin-top:.25rem;max-width:28rem}
.wide{display:inline-block;vertical-align:top;max-width:100%;overflow-x:auto;margin:.5rem 0 .75rem;padding-right:2.5rem}
.wide.checks{display:block;padding-right:0}
table{border-collapse:collapse;font-size:.9rem}
th{font-weight:600;color:var(--soft);vertical-align:bottom}
th,td{padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line);unicode-bidi:isolate}
th{white-space:nowrap;text-align:left}
td{vertical-align:top;overflow-wrap:break-word;max-width:40rem}
td:last-child,th:last-child{padding-right:0}
tbody tr:last-child td{border-bottom:0}
.card{border:1px solid var(--line);border-left:.4rem solid var(--unknown);border-radius:6px;background:var(--card);
padding:.8rem 1rem;margin-bottom:.75rem}
.card.pass{border-left-color:var(--pass)}
.card.warn{border-left-color:var(--warn)}
.card.fail{border-left-color:var(--fail)}
.card .headline{font-size:1.25rem;font-weight:650;margin:0}
.headline.pass,.mark.pass{color:var(--pass)}
.headline.warn{color:var(--warn)}
.headline.fail,.mark.fail{color:var(--fail)}
.headline.unknown,.mark.unknown{color:var(--unknown)}
.mark.warn{color:var(--warn)}
.mark{font-weight:650;white-space:nowrap}
.big{display:flex;flex-wrap:wrap;gap:.25rem 2.25rem;margin:.6rem 0 0;padding:0}
.big div{min-width:6rem}
.big dt{font-size:.8rem;color:var(--soft)}
.big dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums}
.missing{border-left:.25rem solid var(--warn);padding-left:.7rem}
.checks td:last-child{min-width:15rem}
@media (max-width:40rem){.wide{padding-right:1.25rem}.wide.checks{padding-right:0}
.checks table,.checks tbody{display:block}.checks thead{display:none}
.checks tr{display:grid;grid-template-columns:auto 1fr auto auto;gap:0 .6rem;padding:.45rem 0;
border-bottom:1px solid var(--line)}
.checks td{border:0;padding:0}.checks td:nth-child(2){font-weight:600}
.checks td:last-child{grid-column:1/-1;min-width:0}
.several .cells{grid-template-columns:minmax(0,1fr)}}
.reference{color:var(--soft);font-size:.85em}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.7rem .9rem;margin:.5rem 0;
font:.85rem/1.45 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;white-space:pre-wrap}
footer{margin-top:2.5rem}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#9aa4b0;--line:#2c333b;--card:#1c2127;
--pass:#4cc38a;--warn:#e0a63b;--fail:#ff7b6b;--unknown:#9aa4b0;--link:#6cb6ff}}
@page{margin:14mm}
@media print{:root{color-scheme:light}body{max-width:none;padding:0;font-size:10.5pt}nav{display:none}
figure,.card,tr{break-inside:avoid}h2,h3,.good{break-after:avoid}section{margin-top:1rem;padding-top:.7rem}
.wide{overflow:visible}a{color:inherit}.figures{grid-template-columns:repeat(auto-fit,minmax(15rem,1fr))}}
"""
