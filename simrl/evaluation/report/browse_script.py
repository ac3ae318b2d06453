"""The script and the style of pages that filter, sort and search what they have: conversations.html is one.

`script_of` makes a page's script from what is its own. It keeps all rows in memory and draws a page of those that pass
the filters. It sets no HTML: text becomes `textContent`.
"""

STYLE = """
#filters { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 165px), 1fr)); gap: 8px 12px;
  align-items: end; }
#filters label { display: block; font-size: .8rem; color: var(--soft); }
#filters .search { grid-column: span 2; }
input, select, button { font: inherit; font-size: .95rem; color: var(--ink); background: var(--card); width: 100%;
  border: 1px solid var(--line); border-radius: 6px; padding: 5px 8px; min-width: 0; }
.pages { display: flex; gap: 10px; align-items: center; margin: 12px 0; }
.pages button { width: auto; cursor: pointer; }
.pages button:disabled { opacity: .4; cursor: default; }
details.one { background: var(--card); border: 1px solid var(--line); border-left: 5px solid var(--line);
  border-radius: 8px; margin: 8px 0; padding: 4px 12px; }
details.one summary { display: grid; grid-template-columns: 1em 13em 4.5em 6em 7em minmax(0, 1fr); gap: 2px 12px;
  align-items: baseline; }
details.one summary::before { content: '▸'; color: var(--soft); }
details.one[open] summary::before { content: '▾'; }
details.one summary > * { overflow: hidden; text-overflow: ellipsis; }
details.one summary .score { text-align: right; font-variant-numeric: tabular-nums; font-weight: 600; }
details.one summary .first { white-space: nowrap; color: var(--soft); }
.bubbles { max-width: 46em; }
.each { color: var(--soft); font-size: .8rem; }
@media (max-width: 700px) {
  #filters .search { grid-column: 1 / -1; }
  details.one summary { grid-template-columns: 1em minmax(0, 1fr) auto; }
  details.one summary .end { grid-column: 2; }
  details.one summary .first { grid-column: 2 / -1; }
}
"""

# The data of the page, its filters, and its rows. What is a page's own comes after it and ends with `show`.
_SHARED = """
  const PAGE = 50;
  const data = JSON.parse(document.getElementById('data').textContent);
  const filters = document.getElementById('filters');
  const list = document.getElementById('talks');

  const number = (value) => (typeof value === 'number' ? value.toFixed(3) : '\\u2013');
  const element = (tag, kind, text) => {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const distinct = (values) => [...new Set(values)].filter((x) => x !== null);
  const plain = (values) => values.map((value) => [String(value), String(value)]);

  const inputs = {};
  const field = (name, title, input, kind) => {
    const label = element('label', kind, title);
    label.append(input);
    filters.append(label);
    input.name = name;
    inputs[name] = input;
  };
  const choice = (name, title, values, any) => {
    const select = element('select');
    if (any) select.append(new Option(any, ''));
    for (const [value, text] of values) select.append(new Option(text, value));
    field(name, title, select);
  };
  const sorting = (sorts) => {
    choice('sort', 'Sort by', sorts);
    choice('direction', 'Direction', [['1', 'ascending'], ['-1', 'descending']]);
  };
  const searching = (placeholder) => {
    const input = element('input');
    input.type = 'search';
    input.placeholder = placeholder;
    field('text', 'Text', input, 'search');
  };

  // A row that opens; `open` adds what is inside it when it is opened first.
  const folded = (colour, cells, open) => {
    const details = element('details', 'one');
    details.style.borderLeftColor = colour;
    const summary = element('summary');
    summary.append(...cells.map(([kind, text]) => element('span', kind, text)));
    details.append(summary);
    details.addEventListener('toggle', () => {
      if (details.open && details.childElementCount === 1) open(details);
    });
    return details;
  };
  const bubble = (kind, who, text) => {
    const made = element('div', 'bubble ' + kind);
    made.dir = 'auto';
    made.append(element('span', 'who', who), text);
    return made;
  };

  // Draws the items that pass the filters, a page of them at a time.
  // keys: a sort's name -> (item -> number); texts: item -> strings to search; passes: (item, filters' values) -> bool;
  // row: item -> element.
  const show = (items, {keys, texts, passes, row}) => {
    const searched = new WeakMap();  // item -> its text in lower case, once it was searched
    const words = (item) => {
      if (!searched.has(item)) searched.set(item, texts(item).join('\\n').toLowerCase());
      return searched.get(item);
    };
    let found = [];
    let page = 0;

    const draw = () => {
      const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
      page = Math.min(Math.max(page, 0), last);
      const start = page * PAGE;
      const count = (x) => x.toLocaleString('en');
      document.getElementById('found').textContent = found.length
        ? count(found.length) + ' of ' + count(items.length) + '; here ' + count(start + 1) + ' to '
          + count(Math.min(start + PAGE, found.length))
        : 'None of ' + count(items.length) + ' passes the filters.';
      list.replaceChildren(...found.slice(start, start + PAGE).map(row));
      for (const nav of document.querySelectorAll('.pages')) {
        const button = (text, target) => {
          const made = element('button', '', text);
          made.type = 'button';
          made.disabled = target < 0 || target > last;
          made.addEventListener('click', () => { page = target; draw(); });
          return made;
        };
        const place = element('span', 'note', (page + 1) + ' of ' + (last + 1));
        nav.replaceChildren(button('\\u2190 Previous', page - 1), place, button('Next \\u2192', page + 1));
      }
    };

    const select = () => {
      const value = Object.fromEntries(Object.entries(inputs).map(([name, input]) => [name, input.value]));
      const text = value.text.toLowerCase();
      found = items.filter((x) => passes(x, value) && (!text || words(x).includes(text)));
      const key = keys[value.sort];
      const sign = Number(value.direction);
      const keyed = found.map((x, i) => [key(x), i, x]);
      const absent = (x) => x === null || x === undefined;
      keyed.sort(([a, i], [b, j]) => (absent(a) - absent(b)) || (absent(a) ? 0 : sign * (a - b)) || i - j);
      found = keyed.map((x) => x[2]);
      page = 0;
      draw();
    };

    let waiting = 0;
    filters.addEventListener('submit', (event) => event.preventDefault());
    filters.addEventListener('input', () => { clearTimeout(waiting); waiting = setTimeout(select, 120); });
    select();
  };
"""


def script_of(own: str) -> str:
    """A page's script: what such pages share, then its own."""
    return f"\n'use strict';\n(() => {{{_SHARED}{own}}})();\n"


SCRIPT = script_of("""
  const talks = data.talks;
  const mean = (value) => {
    const known = (Array.isArray(value) ? value : [value]).filter((x) => typeof x === 'number');
    return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
  };
  const arm = (talk) => data.assistants[talk.assistant].arm;
  const seed = (talk) => data.assistants[talk.assistant].seed;
  const length = (talk) => talk.messages.filter(([role]) => role === 'assistant')
    .reduce((sum, [, text]) => sum + text.length, 0);

  choice('source', 'From', plain(distinct(talks.map((x) => x.source))), 'everywhere');
  choice('arm', 'Arm', plain(distinct(talks.map(arm))), 'every arm');
  choice('seed', 'Training seed', plain(distinct(talks.map(seed)).sort((a, b) => a - b)), 'every seed');
  choice('end', 'End', plain(distinct(talks.map((x) => x.end)).sort()), 'every end');
  const parts = [...new Set(talks.flatMap((x) => Object.keys(x.parts)))].sort();
  const keys = {
    order: () => 0, score: (x) => x.score, length, messages: (x) => x.messages.length, step: (x) => x.step,
  };
  for (const name of parts) keys['part ' + name] = (x) => mean(x.parts[name]);
  sorting([['order', 'as they come'], ['score', 'score'], ['length', 'length of replies'],
    ['messages', 'number of messages'], ['step', 'step'], ...parts.map((x) => ['part ' + x, x.replaceAll('_', ' ')])]);
  for (const [name, title] of [['low', 'Score from'], ['high', 'Score to']]) {
    const input = element('input');
    input.type = 'number';
    input.step = 'any';
    field(name, title, input);
  }
  searching('words of a message, an example\\u2019s id');

  const passes = (x, value) => {
    const [low, high] = [value.low, value.high].map((x) => (x === '' ? null : Number(x)));
    return (!value.source || x.source === value.source)
      && (!value.arm || arm(x) === value.arm)
      && (!value.seed || String(seed(x)) === value.seed)
      && (!value.end || x.end === value.end)
      && (low === null || (x.score !== null && x.score >= low))
      && (high === null || (x.score !== null && x.score <= high));
  };

  const open = (details, talk) => {
    const bubbles = element('div', 'bubbles');
    let reply = 0;
    for (const [role, text] of talk.messages) {
      bubbles.append(bubble(role === 'assistant' ? 'assistant' : 'user', role, text));
      if (role !== 'assistant') continue;
      const own = Object.entries(talk.parts).filter(([, x]) => Array.isArray(x) && reply < x.length);
      const said = own.map(([name, x]) => name.replaceAll('_', ' ') + ' ' + number(x[reply])).join('; ');
      if (said) bubbles.append(element('div', 'each', said));
      reply += 1;
    }
    const facts = Object.entries(talk.parts).map(([name, x]) => name.replaceAll('_', ' ') + ' ' + number(mean(x))
      + (Array.isArray(x) ? ' (mean)' : ''));
    const about = ['score ' + number(talk.score), ...facts, 'ended: ' + talk.end, 'example ' + talk.example];
    details.append(bubbles, element('p', 'note', about.join('; ')));
    for (const [name, text] of talk.notes) details.append(element('p', 'note', name + ': ' + text));
  };

  const row = (talk) => {
    const first = talk.messages.find((x) => x[1].trim());
    return folded(data.assistants[talk.assistant].colour, [
      ['name', talk.assistant],
      ['score', number(talk.score)],
      ['end', talk.end],
      ['', talk.step === null ? 'evaluation' : 'step ' + talk.step],
      ['first', first ? first[1].slice(0, 160) : ''],
    ], (details) => open(details, talk));
  };

  const texts = (x) => [x.example, ...x.messages.map((m) => m[1]), ...x.notes.map((n) => n[1])];
  show(talks, {keys, texts, passes, row});
""")
