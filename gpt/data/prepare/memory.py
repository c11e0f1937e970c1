"""Estimate of the memory of a preparation, from the sizes of its files and the number of its workers."""

import logging

from gpt.data.prepare.compression import MAGIC_OF_SUFFIX
from gpt.data.prepare.learn_tokenizer import SAMPLE_BYTES
from gpt.data.prepare.parts import MAX_PARTS, PART_BYTES
from gpt.data.prepare.preparation_plan import PreparationPlan
from gpt.data.prepare.sources import File
from gpt.machine.resources import find_free_host_memory
from gpt.utils.helper import format_si, plural

log = logging.getLogger(__name__)

PROCESS_BYTES = 60 * 2**20
"""Interpreter and libraries of a process."""
VOCABULARY_BYTES = 80 * 2**20
"""Vocabulary of a tokenizer other than byte and char, in each process."""
BYTES_PER_TEXT_BYTE = 12
"""Memory per byte of text that is read at once: the text, its ids and copies of both."""
BYTES_PER_SAMPLE_BYTE = 4
"""Memory per byte of the sample that bpe is trained on."""
COMPRESSION_RATIO = 4
"""Bytes of a text per byte of its compressed file, roughly."""
MAX_MEMORY_SHARE = 0.9
"""Share of the free memory beyond which a preparation warns."""


def estimate_memory(plan: PreparationPlan) -> int:
    """Return an upper estimate of the bytes that all processes of a preparation need; rough for compressed texts."""
    files = [file for source in plan.sources for file in source.files]
    part_bytes = max(PART_BYTES, plan.size // MAX_PARTS)
    piece = max((_estimate_piece(file, part_bytes) for file in files), default=0)
    process = PROCESS_BYTES + (0 if plan.tokenizer in ("byte", "char") else VOCABULARY_BYTES)
    learning = BYTES_PER_SAMPLE_BYTE * min(SAMPLE_BYTES, plan.size) if plan.tokenizer == "bpe" else 0
    if plan.n_processes == 1:
        return process + max(BYTES_PER_TEXT_BYTE * piece, learning)
    return process + learning + plan.n_processes * (process + BYTES_PER_TEXT_BYTE * piece)


def report_memory(plan: PreparationPlan) -> None:
    """Log the memory that a preparation needs against what is free, as a warning if it may not fit."""
    needed, free = estimate_memory(plan), find_free_host_memory()
    what = f"preparing takes about {format_si(needed, 'B')} of memory with {plural(plan.n_processes, 'worker')}"
    if free is None:
        log.info("%s", what)
    elif needed <= MAX_MEMORY_SHARE * free:
        log.info("%s, of %s free", what, format_si(free, "B"))
    else:
        remedy = "lower --data.workers" if plan.n_processes > 1 else "give the process more"
        log.warning("%s, and %s are free; %s", what, format_si(free, "B"), remedy)


def _estimate_piece(file: File, part_bytes: int) -> int:
    """Return the bytes of text of a file that are in memory at once."""
    if file.kind == "text" and file.path.suffix.lower() in MAGIC_OF_SUFFIX:  # one document, which is never cut
        return COMPRESSION_RATIO * file.size
    return part_bytes if file.kind in ("dataset", "hub") else min(file.size, part_bytes)
