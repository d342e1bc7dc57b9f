"""Data sets: look at the pictures, write their captions, find what is wrong with them.

The page lives in the browser (`static/dataset.js`), as a thousand pictures are too many for components. It asks the
server through one function; what it may ask for is `_answers`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import gradio as gr

from lora_diffusion.errors import UserError
from webui.components.html import html
from webui.components.listen import once_loaded
from webui.services.captioning import Captioning
from webui.services.datasets import Datasets
from webui.services.site import Site
from webui.translate import Translator, words

logger = logging.getLogger(__name__)

START = "window.loraDiffusionDataset(element, server);"

Question = dict[str, Any]
Answer = Any


def build(site: Site, t: Translator, demo: gr.Blocks) -> None:
    """Layout; all events are the browser's."""
    datasets = Datasets(site.places)
    answers = _answers(datasets, Captioning(datasets, site.queue))

    def ask(question: Question) -> Answer:
        """What the page sends: {"do": …, …}. An error for people comes back as {"error": text}."""
        try:
            return answers[str(question["do"])](question)
        except UserError as error:
            return {"error": str(error)}
        except (KeyError, TypeError, ValueError, AttributeError):
            logger.exception("a question of the data set page")
            return {"error": "The page asked for something that there is not. Reload it."}
        except OSError as error:
            return {"error": f"{error.strerror or error}"}

    texts = {key: text for key, text in words(t.language).items() if key.startswith("dataset.")}
    gr.HTML(
        str(
            html(
                '<div id="dataset" data-words="{texts}" data-train="{train}"><p class="busy">…</p></div>',
                texts=json.dumps(texts, ensure_ascii=False),
                train=t.href("/"),
            )
        ),
        elem_id="dataset-page",
        apply_default_css=False,
        js_on_load=once_loaded("loraDiffusionCaptioning", once_loaded("loraDiffusionDataset", START)),
        server_functions=[ask],
    )


def _answers(datasets: Datasets, captioning: Captioning) -> dict[str, Callable[[Question], Answer]]:
    return {
        "all": lambda q: datasets.all(),
        "open": lambda q: datasets.open(str(q["set"])),
        "look": lambda q: datasets.look(str(q["set"])),
        "view": lambda q: datasets.view(
            str(q["set"]), q["filter"], int(q["resolution"] or 0), int(q["step"]), str(q["base"])
        ),
        "save": lambda q: datasets.save(str(q["set"]), str(q["name"]), q["before"], str(q["text"])),
        "preview": lambda q: datasets.preview(str(q["set"]), q["names"], q["edit"]),
        "apply": lambda q: datasets.apply(str(q["set"]), q["names"], q["edit"], str(q["digest"]), q["without"]),
        "undo": lambda q: datasets.undo(str(q["set"])),
        "redo": lambda q: datasets.undo(str(q["set"]), again=True),
        "mend": lambda q: datasets.mend(str(q["set"]), str(q["name"]), q["options"]),
        "mending": lambda q: datasets.mending(str(q["set"])),
        "captioning": lambda q: captioning.state(str(q["set"])),
        "caption": lambda q: captioning.start(str(q["set"]), q["options"]),
        "caption_stop": lambda q: captioning.stop(str(q["set"])),
        "take_in": lambda q: captioning.take_in(str(q["set"])),
        "proposals": lambda q: captioning.proposals(str(q["set"])),
        "accept": lambda q: captioning.accept(str(q["set"]), q["chosen"]),
        "reject": lambda q: captioning.reject(str(q["set"]), q["names"], back=bool(q["back"])),
        "make": lambda q: {"set": datasets.make_set(str(q["name"]))},
        "upload": lambda q: {
            "name": datasets.upload(
                str(q["set"]), str(q["name"]), str(q["piece"]), int(q["offset"]), is_last=bool(q["last"])
            )
        },
    }
