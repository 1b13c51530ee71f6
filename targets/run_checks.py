"""What a step asks for, checked before anything changes."""

import numpy as np

from exporter.core.errors import InputError
from targets.base import Limits, RunOptions


def check_options(limits: Limits, options: RunOptions) -> None:
    if not 1 <= options.batch <= limits.max_batch:
        raise InputError(
            "run.batch", f"batch {options.batch}, the engine was built for 1 to {limits.max_batch}", "see --max-batch"
        )
    if options.max_seq_len is not None and not 1 <= options.max_seq_len <= limits.max_seq_len:
        raise InputError(
            "run.max_seq_len",
            f"{options.max_seq_len} positions asked for, the engine was built for up to {limits.max_seq_len}",
            "build with a larger --max-seq-len",
        )


def check_decode(input_ids: np.ndarray, active: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [B] and bool active [B] as arrays of that shape."""
    ids, flags = np.asarray(input_ids), np.asarray(active)
    if ids.shape != (batch,):
        raise _bad_shape("input_ids", ids, f"integers [{batch}]")
    if flags.shape != (batch,) or flags.dtype != np.bool_:
        raise _bad_shape("active", flags, f"bool [{batch}]")
    return ids, flags


def check_step(
    input_ids: np.ndarray, lengths: np.ndarray, before: np.ndarray, limit: int, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """ids int64 [B, S], zero where they are padding, and valid lengths int64 [B], for rows that hold `before` [B].

    Raises InputError: wrong shapes or dtypes, lengths beyond S, ids outside the vocabulary, rows beyond `limit`.
    """
    ids, valid = np.asarray(input_ids), np.asarray(lengths)
    if ids.ndim != 2 or len(ids) != len(before) or ids.dtype.kind not in "iu":
        raise _bad_shape("input_ids", ids, f"integers [{len(before)}, S]")
    if valid.shape != before.shape or valid.dtype.kind not in "iu":
        raise _bad_shape("lengths", valid, f"integers [{len(before)}]")
    if (valid < 0).any() or (valid > ids.shape[1]).any():
        raise InputError("run.lengths", f"lengths {valid.tolist()} of rows {ids.shape[1]} wide", "0 to the width")
    inside = np.arange(ids.shape[1]) < valid[:, None]
    _check_ids(ids[inside], vocabulary)
    after = before + valid
    if (after > limit).any():
        row = int(np.argmax(after))
        raise InputError(
            "run.too_long",
            f"row {row} would hold {after[row]} positions, the limit is {limit}",
            "shorten the prompt or the answer, or build with a larger --max-seq-len",
        )
    return np.where(inside, ids, 0).astype(np.int64), valid.astype(np.int64)


def _check_ids(used: np.ndarray, vocabulary: int) -> None:
    if used.size and (used.min() < 0 or used.max() >= vocabulary):
        raise InputError(
            "run.token_id",
            f"token ids from {used.min()} to {used.max()}, the vocabulary has {vocabulary}",
            "use the tokenizer of this model",
        )


def _bad_shape(name: str, array: np.ndarray, expected: str) -> InputError:
    return InputError("run.shape", f"{name} is {array.dtype} {list(array.shape)}, expected {expected}", "")


def check_truncate(row: int, length: int, lengths: np.ndarray) -> None:
    """Raise InputError unless a row of `lengths` [B] has `length` cached positions to keep."""
    if not 0 <= row < len(lengths) or not 0 <= length <= lengths[row]:
        cached = int(lengths[row]) if 0 <= row < len(lengths) else 0
        raise InputError(
            "run.truncate", f"cannot keep {length} positions of row {row}: it has {cached}", "keep a prefix"
        )
