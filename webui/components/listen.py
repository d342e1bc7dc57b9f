"""What the browser does with clicks and sliders in our own HTML: they become the component's events."""

from __future__ import annotations

CLICKS = """
element.addEventListener('click', (event) => {
    const button = event.target.closest('[data-act]');
    if (!button || (button.dataset.confirm && !window.confirm(button.dataset.confirm))) return;
    trigger('select', { ...button.dataset });
});
element.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && event.target.matches('[role=button][data-act]')) event.target.click();
});
"""
"""`select` with the data attributes of the button that was clicked, after its question if it has one."""

STACK = """
element.addEventListener('input', (event) => {
    const range = event.target.closest('input[type=range]');
    if (!range) return;
    range.nextElementSibling.textContent = String(Number(range.value));
    trigger('input', { name: range.dataset.name, strength: Number(range.value) });
});
element.addEventListener('click', (event) => {
    const button = event.target.closest('[data-act]');
    if (button) trigger('select', { ...button.dataset });
});
"""
"""For `render_stack`: `input` while a slider moves, with name and strength; `select` for its buttons."""


def once_loaded(name: str, call: str) -> str:
    """`call` as soon as our script has defined `window.<name>`: Gradio may mount a component before it has loaded it."""
    return f"(function start() {{ if (window.{name}) {{ {call} }} else setTimeout(start, 20); }})();"
