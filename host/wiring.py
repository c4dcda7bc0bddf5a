"""Which outputs of a node something is wired to, so that only those are made.

ComfyUI tells a node that runs (hidden inputs), and not what its outputs' place in the cache goes
by (`fingerprint_inputs`); there the prompt that runs is looked up.
"""

from __future__ import annotations

from collections.abc import Mapping

from comfy_execution.utils import get_executing_context
from server import PromptServer


def wired(node: str | None) -> frozenset[int] | None:
    """Numbers of the outputs of a node, in the prompt that runs, that lead somewhere.

    None where that is not known: in a host without a server, or of a node that is not in the graph
    as it was queued.
    """
    prompt = _running()
    if prompt is None or node not in prompt:
        return None
    links = (link for one in prompt.values() for link in one["inputs"].values())
    return frozenset(
        link[1]
        for link in links
        if isinstance(link, list) and link[:1] == [node] and len(link) == 2
    )


def fingerprint(node: str | None, *slots: int) -> str:
    """For `fingerprint_inputs`: which of these outputs lead somewhere."""
    to = wired(node)
    return "unknown" if to is None else str(sorted(to & set(slots)))


def _running() -> Mapping[str, Mapping[str, Mapping[str, object]]] | None:
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    queue = getattr(server, "prompt_queue", None)
    if context is None or queue is None:
        return None
    running, _ = queue.get_current_queue_volatile()
    return next((item[2] for item in running if item[1] == context.prompt_id), None)
