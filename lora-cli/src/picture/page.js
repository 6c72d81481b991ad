'use strict';
(() => {
  const tip = document.getElementById('tip');
  const all = (root, selector) => [...root.querySelectorAll(selector)];
  const numbers = text => (text.match(/-?[\d.]+/g) || []).map(Number);
  const say = (event, text) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const x = event.clientX + 14 + box.width > innerWidth ? event.clientX - 14 - box.width : event.clientX + 14;
    const y = event.clientY + 18 + box.height > innerHeight ? event.clientY - 12 - box.height : event.clientY + 18;
    tip.style.left = Math.max(4, x) + 'px';
    tip.style.top = Math.max(4, y) + 'px';
  };
  const hush = () => { tip.hidden = true; };
  const make = (svg, name, kind) => {
    const element = document.createElementNS(svg.namespaceURI, name);
    element.setAttribute('class', kind);
    svg.append(element);
    return element;
  };
  const set = (element, values) => {
    for (const name in values) element.setAttribute(name, values[name]);
  };
  const place = (svg, event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const short = value => {
    const size = Math.abs(value);
    if (size === 0) return '0';
    return size >= 1e-4 && size < 1e7 ? String(Number(value.toPrecision(3))) : value.toExponential(2);
  };

  for (const element of all(document, '[data-tip]')) {
    element.addEventListener('pointermove', event => say(event, element.dataset.tip));
    element.addEventListener('pointerleave', hush);
  }

  // Curves: the nearest one to the pointer is brought to the front and read off.
  for (const svg of all(document, 'svg[data-plot]')) {
    const [left, top, right, bottom] = numbers(svg.dataset.plot);
    const axis = (text, from, to) => {
      const [scale, low, high, whole] = text.split(' ').map((part, index) => index ? Number(part) : part);
      return {
        whole: whole === 1,
        value: pixel => {
          const value = low + (high - low) * (pixel - from) / (to - from);
          return scale === 'log' ? 10 ** value : value;
        },
        pixel: value => from + ((scale === 'log' ? Math.log10(value) : value) - low) / (high - low) * (to - from),
      };
    };
    const across = axis(svg.dataset.x, left, right), up = axis(svg.dataset.y, bottom, top);
    const curves = all(svg, 'path.l');
    let parsed = null, front = null, dot = null;
    const parse = () => curves.map(path => path.getAttribute('d').split('M').slice(1).map(run => {
      const flat = numbers(run), points = [];
      for (let i = 0; i + 1 < flat.length; i += 2) points.push([flat[i], flat[i + 1]]);
      return points;
    }));
    const heightAt = (runs, x) => {
      for (const points of runs) {
        const last = points.length - 1;
        if (x < points[0][0] - 4 || x > points[last][0] + 4) continue;
        let low = 0, high = last;
        while (high - low > 1) {
          const middle = (low + high) >> 1;
          if (points[middle][0] <= x) low = middle; else high = middle;
        }
        const [from, to] = [points[low], points[high]];
        const share = to[0] > from[0] ? Math.min(1, Math.max(0, (x - from[0]) / (to[0] - from[0]))) : 0;
        return from[1] + (to[1] - from[1]) * share;
      }
      return NaN;
    };
    const leave = () => {
      hush();
      if (front) { front.remove(); dot.remove(); front = dot = null; }
    };
    svg.addEventListener('pointerleave', leave);
    svg.addEventListener('pointermove', event => {
      if (event.target.closest('.key')) return;
      const at = place(svg, event);
      if (at.x < left - 6 || at.x > right + 6 || at.y < top - 6 || at.y > bottom + 6) return leave();
      parsed = parsed || parse();
      // Where there are only whole numbers, what is read off is at one.
      let value = across.value(Math.min(right, Math.max(left, at.x)));
      if (across.whole) value = Math.round(value);
      const x = Math.min(right, Math.max(left, across.pixel(value)));
      let best = null;
      curves.forEach((path, index) => {
        if (path.classList.contains('off')) return;
        const y = heightAt(parsed[index], x), distance = Math.abs(y - at.y);
        if (y >= top - 3 && y <= bottom + 3 && (!best || distance <= best.distance)) best = { path, y, distance };
      });
      if (!best || best.distance > 60) return leave();
      if (!front) { front = make(svg, 'path', ''); dot = make(svg, 'circle', ''); }
      const hue = best.path.getAttribute('class').match(/s(\d)/)[1];
      set(front, { class: 'l on s' + hue, d: best.path.getAttribute('d') });
      set(dot, { class: 'dot f' + hue, cx: x, cy: best.y, r: 5 });
      say(event, best.path.dataset.name + '\n' + svg.dataset.across + ' ' + short(value) + '\n' + svg.dataset.up + ' ' + short(up.value(best.y)));
    });
    const keys = all(svg, '.key');
    const only = key => {
      const pressed = key.getAttribute('aria-pressed') !== 'true';
      for (const other of keys) other.setAttribute('aria-pressed', pressed && other === key);
      for (const path of curves) path.classList.toggle('off', pressed && !path.classList.contains('s' + key.dataset.hue));
      leave();
    };
    for (const key of keys) {
      set(key, { role: 'button', 'aria-pressed': 'false' });
      key.addEventListener('click', () => only(key));
      key.addEventListener('keydown', event => {
        if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); only(key); }
      });
    }
  }

  // Matrices: the cell under the pointer.
  for (const svg of all(document, 'svg[data-grid]')) {
    const [left, top, wide, high, columns, rows] = svg.dataset.grid.split(' ').map(Number);
    const names = { row: svg.dataset.rows.split('\n'), column: svg.dataset.columns.split('\n') };
    const values = svg.dataset.values.split(' ');
    let frame = null;
    const leave = () => { hush(); if (frame) { frame.remove(); frame = null; } };
    svg.addEventListener('pointerleave', leave);
    svg.addEventListener('pointermove', event => {
      const at = place(svg, event);
      const column = Math.floor((at.x - left) / wide), row = Math.floor((at.y - top) / high);
      if (column < 0 || row < 0 || column >= columns || row >= rows) return leave();
      frame = frame || make(svg, 'rect', 'frame');
      set(frame, { x: left + column * wide, y: top + row * high, width: wide, height: high, rx: 2 });
      const value = values[row * columns + column];
      const what = svg.dataset.legend ? svg.dataset.legend + ' ' : '';
      say(event, names.row[row] + ' · ' + names.column[column] + '\n' + what + (value === '·' ? 'none' : value));
    });
  }

  // Tables: a click on a heading sorts, text in the field filters.
  for (const table of all(document, 'table')) {
    const body = table.tBodies[0], heads = all(table, 'th');
    const worth = (row, index, number) => {
      const cell = row.cells[index];
      if (!number) return cell.textContent;
      if (cell.textContent === '') return -Infinity;
      const value = Number(cell.dataset.v ?? cell.textContent);
      return Number.isNaN(value) ? -Infinity : value;
    };
    heads.forEach((head, index) => head.firstChild.addEventListener('click', () => {
      const number = head.classList.contains('number');
      const before = head.getAttribute('aria-sort');
      const down = before ? before === 'ascending' : number;
      for (const other of heads) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const order = (one, other) => number ? one - other : one.localeCompare(other, undefined, { numeric: true });
      const keyed = [...body.rows].map(row => [worth(row, index, number), row]);
      keyed.sort((one, other) => down ? order(other[0], one[0]) : order(one[0], other[0]));
      body.append(...keyed.map(pair => pair[1]));
    }));
    const field = table.closest('details')?.querySelector('.filter input');
    field?.addEventListener('input', () => {
      const wanted = field.value.trim().toLowerCase();
      let shown = 0;
      for (const row of body.rows) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
        shown += !row.hidden;
      }
      field.nextElementSibling.textContent = wanted ? shown + ' of ' + body.rows.length : '';
    });
  }
})();
