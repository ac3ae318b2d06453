// What pages do more than a form: keep drafts, count how a text was written, wait for replies. All works without it.
'use strict';
(() => {
  const page = document.body.dataset;
  const forms = [...document.querySelectorAll('form')];
  const hidden = new Set(['csrf', 'version', 'pasted', 'typed', 'seconds']);
  const key = (form) => `draft:${page.who}:${form.dataset.draft}`;
  const AGAIN = 10000; // milliseconds after which a form may be sent again
  let changed = false;
  let sent = false;

  function read(form) {
    try {
      return JSON.parse(sessionStorage.getItem(key(form))) || {};
    } catch {
      return {}; // no storage in this browser, or not ours: there is no draft
    }
  }

  function write(form, draft) {
    try {
      sessionStorage.setItem(key(form), JSON.stringify(draft));
    } catch {
      return; // full or forbidden: drafts are a convenience
    }
  }

  function fields(form) {
    return [...form.elements].filter((field) => field.name && !hidden.has(field.name) && field.type !== 'submit');
  }

  function follow(form) {
    const draft = { values: {}, pasted: 0, typed: 0, began: Date.now(), ...read(form) };
    for (const field of fields(form)) {
      const value = draft.values[field.name];
      if (value === undefined) continue;
      if (field.type === 'radio') field.checked = field.value === value;
      else field.value = value;
    }
    const save = () => {
      for (const field of fields(form)) {
        if (field.type !== 'radio' || field.checked) draft.values[field.name] = field.value;
      }
      write(form, draft);
    };
    write(form, draft);
    form.addEventListener('input', (event) => {
      const kind = event.inputType || '';
      if (event.target.tagName === 'TEXTAREA' && !/^insertFrom(Paste|Drop)/.test(kind)) draft.typed += 1;
      changed = true;
      save();
    });
    const transferred = (data) => {
      draft.pasted += data ? data.getData('text').length : 0;
      save();
    };
    form.addEventListener('paste', (event) => transferred(event.clipboardData));
    form.addEventListener('drop', (event) => transferred(event.dataTransfer));
    form.addEventListener('submit', () => {
      form.elements.pasted.value = draft.pasted;
      form.elements.typed.value = draft.typed;
      form.elements.seconds.value = Math.max(0, (Date.now() - draft.began) / 1000).toFixed(1);
    });
  }

  function forget(kept) {
    // Drafts of earlier steps and of other people at this browser.
    try {
      for (const name of Object.keys(sessionStorage)) {
        if (name.startsWith('draft:') && !kept.has(name)) sessionStorage.removeItem(name);
      }
    } catch {
      return; // no storage, no drafts
    }
  }

  function count(output) {
    const field = document.getElementById(output.dataset.count);
    const show = () => {
      const words = field.value.split(/\s+/).filter(Boolean).length;
      output.textContent = output.dataset.label.replace('{found}', words);
    };
    field.addEventListener('input', show);
    show();
  }

  function reload() {
    history.scrollRestoration = 'manual';
    history.replaceState(null, '', page.waiting === undefined ? '/' : '/#now');
    location.reload();
  }

  async function look() {
    // True if the participant's page is another one by now.
    try {
      const answer = await fetch('/state', { cache: 'no-store' });
      document.getElementById('lost').hidden = answer.ok || answer.status === 403;
      if (answer.status === 403) return true;
      return answer.ok && String((await answer.json()).version) !== page.version;
    } catch {
      document.getElementById('lost').hidden = false; // no network, or the server is being restarted
      return false;
    }
  }

  async function wait() {
    if (await look()) reload();
    else setTimeout(wait, 1000 * Number(page.poll));
  }

  const drafts = forms.filter((form) => form.dataset.draft);
  if (page.clean !== undefined) forget(new Set(drafts.map(key)));
  drafts.forEach(follow);
  document.querySelectorAll('[data-count]').forEach(count);

  for (const form of forms) {
    form.addEventListener('submit', (event) => {
      if (sent) event.preventDefault(); // a second click
      sent = true;
      const disable = (yes) => form.querySelectorAll('button').forEach((button) => { button.disabled = yes; });
      setTimeout(disable, 0, true);
      setTimeout(() => { // still here: it was stopped, or the network is gone. A form that arrives twice counts once.
        sent = false;
        disable(false);
      }, AGAIN);
    });
  }
  addEventListener('pageshow', (event) => {
    if (event.persisted) location.reload(); // brought back by the browser: it may be of an earlier step
  });

  const start = document.getElementById('errors') || (location.hash === '#now' && document.getElementById('now'));
  if (start) {
    start.focus({ preventScroll: true });
    start.scrollIntoView();
  }
  if (location.search) history.replaceState(null, '', location.pathname + location.hash);

  if (page.waiting !== undefined) wait();
  else if (page.version !== undefined) {
    document.addEventListener('visibilitychange', async () => {
      if (document.hidden || sent || !(await look())) return;
      if (changed) document.getElementById('moved').hidden = false;
      else reload();
    });
  }
})();
