"""How a page looks and what it does when it is clicked; everything stands in the page itself."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root{color-scheme:light dark;--text:#1c2227;--soft:#5b6770;--page:#fbfbfa;--card:#fff;
--line:#d9dee2;--warn:#9a4a00;--box:1px solid var(--line);--s0:#0b63b0;--s1:#c4500c;--s2:#1d7a46;
--s3:#8a3ea8;--s4:#8c6a00;--s5:#b3264a}
@media(prefers-color-scheme:dark){:root{--text:#e4e8eb;--soft:#9aa6af;--page:#14181b;
--card:#1c2125;--line:#343c43;--warn:#f0b070;--s0:#6db3f2;--s1:#f2a065;--s2:#6cc993;--s3:#cf9be6;
--s4:#dcc063;--s5:#f08ca5}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}
main{max-width:72rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.2rem 0 .5rem;padding-top:.4rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.4rem 0}
a{color:var(--s0)}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.8rem 0;font-size:.9rem}
.soft,figcaption,caption,footer{color:var(--soft);font-size:.9rem}
.warn{border-left:4px solid var(--warn);padding:.3rem .8rem;background:var(--card)}
.wide{overflow:auto;background:var(--card);border:var(--box);border-radius:6px;margin:.5rem 0}
.tall{max-height:34rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;width:100%}
caption{text-align:left;padding:.4rem .7rem}
th,td{padding:.3rem .7rem;border-bottom:var(--box);text-align:left;white-space:nowrap;
overflow-wrap:normal}
th{position:sticky;top:0;background:var(--card);white-space:normal;vertical-align:bottom;
box-shadow:0 1px var(--line);z-index:1}
tr:last-child td{border-bottom:0}
tbody tr:hover td{background:color-mix(in srgb,var(--s0) 8%,transparent)}
td.n,th.n{text-align:right}
td.long{white-space:normal;min-width:16rem;overflow-wrap:anywhere}
th button{all:unset;cursor:pointer;font-weight:600}
button:focus-visible{outline:2px solid var(--s0)}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.5rem;
margin:.8rem 0}
.facts div{background:var(--card);border:var(--box);border-radius:6px;padding:.5rem .7rem}
.facts .two{grid-column:span 2}
.facts dt,.facts small{color:var(--soft);font-size:.8rem}
.facts div{min-width:0}
.facts dd{margin:0;font-size:1.05rem}
.row{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(15rem,100%),1fr));gap:1rem}
.one{grid-template-columns:minmax(0,1fr)}
.one img{max-width:min(100%,52rem)}
.small{grid-template-columns:repeat(auto-fill,minmax(min(10rem,45%),1fr));gap:.6rem}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr))}
figure{margin:.4rem 0;min-width:0}
img,svg{max-width:100%;height:auto;display:block}
figure button{all:unset;cursor:zoom-in;display:block;max-width:100%}
figure:target img{outline:3px solid var(--s1)}
dialog{max-width:96vw;max-height:96vh;padding:.5rem;border:0;border-radius:6px;overflow:auto;
background:var(--card);color:var(--text)}
dialog::backdrop{background:#000b}
dialog img{max-width:none;min-width:min(40rem,90vw);cursor:zoom-out}
pre{overflow-x:auto;background:var(--card);border:var(--box);border-radius:6px;padding:.7rem;
font-size:.8rem;max-height:34rem}
details{margin:.6rem 0}
summary{cursor:pointer}
footer{margin:2.5rem 0 1rem;border-top:var(--box);padding-top:.6rem}
@media(max-width:40rem){main{padding:.7rem}th,td{padding:.3rem .5rem}}
"""

# A click on a heading sorts its table, gaps last; a click on a picture shows it at full size.
SCRIPT = """
document.querySelectorAll("th button").forEach(b=>b.onclick=()=>{
const th=b.parentNode,body=th.closest("table").tBodies[0],up=th.ariaSort!=="ascending";
th.parentNode.querySelectorAll("th").forEach(o=>o.removeAttribute("aria-sort"));
th.setAttribute("aria-sort",up?"ascending":"descending");
const key=r=>r.cells[th.cellIndex].dataset.v,num=x=>x!==""&&!isNaN(x);
[...body.rows].sort((r,s)=>{const x=key(r),y=key(s);
if(x===""||y==="")return(x==="")-(y==="");
return(up?1:-1)*(num(x)&&num(y)?x-y:x.localeCompare(y))}).forEach(r=>body.append(r))});
document.querySelectorAll("figure button").forEach(b=>b.onclick=()=>{
const d=document.createElement("dialog"),i=b.firstElementChild.cloneNode();
i.loading="eager";d.append(i,b.parentNode.querySelector("figcaption").cloneNode(true));
d.onclick=()=>d.close();d.onclose=()=>d.remove();document.body.append(d);d.showModal()});
"""
