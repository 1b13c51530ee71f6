"""Attention of single tokens: the cache is read once, by all threads, however few heads or rows there are.

The work is a line of units of UNIT positions, in the order segment, kv head, position; every thread takes an equal
piece of it. A head that ends in another thread's piece is merged afterwards. At most two heads of a piece are
incomplete: the first and the last.
"""

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.attention_plan import LOWEST, Operands
from targets.tvm.kernels.attention_tiles import Products, Scores, State, Sums, gather, soften
from targets.tvm.kernels.cache_format import BLOCK
from targets.tvm.kernels.cache_values import read_cached
from targets.tvm.kernels.ir import Expr, float_vector, load, store

UNIT = 128
"""Positions of one round of the online softmax."""
MOST_WORKERS = 64
"""More threads than this find no piece; workspaces have constant sizes."""


def decode(operands: Operands, threads: Expr) -> None:
    """y of every segment; each has one token."""
    line = _Line(operands)
    total = line.count()
    workers = T.bind(T.min(T.min(threads, T.int64(MOST_WORKERS)), total))
    partial = State(operands.plan, MOST_WORKERS * 2 * operands.plan.group)
    with T.parallel(0, workers) as worker:
        _Worker(operands).run(line, total, workers, worker, partial)
    with T.If(workers > 1), T.Then():
        _merge(operands, line, total, workers, partial)


class _Line:
    """The line of units."""

    def __init__(self, operands: Operands) -> None:
        self.operands = operands

    def length(self, segment: Expr) -> Expr:
        """Positions that the segment's token sees."""
        return T.cast(self.operands.segments[segment * 4 + 3], "int64") + 1

    def units(self, segment: Expr) -> Expr:
        return (self.length(segment) + (UNIT - 1)) // UNIT

    def count(self) -> Expr:
        total = T.alloc_buffer((1,), "int64")
        T.buffer_store(total, T.int64(0), [0])
        with T.serial(0, self.operands.segment_count) as segment:
            T.buffer_store(total, total[0] + self.units(segment) * self.operands.plan.kv_heads, [0])
        return T.bind(total[0])


def _bounds(total: Expr, workers: Expr, worker: Expr) -> tuple[Expr, Expr]:
    return T.bind(total * worker // workers), T.bind(total * (worker + 1) // workers)


class _Worker:
    """One thread's piece."""

    def __init__(self, operands: Operands) -> None:
        self.operands, self.plan = operands, operands.plan

    def run(self, line: _Line, total: Expr, workers: Expr, worker: Expr, partial: State) -> None:
        plan = self.plan
        self.state = State(plan, plan.group)
        self.scores = T.alloc_buffer((plan.group * UNIT,), "float32")
        self.factors = T.alloc_buffer((plan.group * plan.lanes,), "float32")
        start, stop = _bounds(total, workers, worker)
        passed = T.alloc_buffer((1,), "int64")
        T.buffer_store(passed, T.int64(0), [0])
        with T.serial(0, self.operands.segment_count) as segment:
            units, length = T.bind(line.units(segment)), T.bind(line.length(segment))
            with T.serial(0, plan.kv_heads) as head:
                low = T.bind(T.max(start - passed[0], T.int64(0)))
                high = T.bind(T.min(stop - passed[0], units))
                with T.If(low < high), T.Then():
                    self._positions(segment, head, length, low, high)
                    with T.If(high - low == units):
                        with T.Then():
                            _write(self.operands, self.state, segment, head)
                        with T.Else():
                            slot = worker * 2 + T.cast(low == 0, "int64")
                            self._keep(partial, slot * plan.group)
                T.buffer_store(passed, passed[0] + units, [0])

    def _keep(self, partial: State, first: Expr) -> None:
        partial.clear(first, self.plan.group)
        with T.serial(0, self.plan.group) as row:
            partial.merge(first + row, self.state, row)

    def _positions(self, segment: Expr, head: Expr, length: Expr, low: Expr, high: Expr) -> None:
        """Units low to high of one head of a segment."""
        plan, operands = self.plan, self.operands
        row = T.cast(operands.segments[segment * 4], "int64")
        lane = T.bind((row * plan.kv_heads + head) * (operands.blocks * BLOCK))
        token = T.cast(operands.segments[segment * 4 + 1], "int64")
        query = T.bind((token * plan.kv_heads + head) * (plan.group * plan.head_dim))
        self.state.clear(0, plan.group)
        with T.serial(0, high - low) as number:
            start = T.bind((low + number) * UNIT)
            count = T.bind(T.min(length - start, T.int64(UNIT)))
            blocks = T.bind((count + (BLOCK - 1)) // BLOCK)
            for first, rows in plan.decode_batches:
                with T.serial(0, blocks) as block:
                    self._score(lane + start, query, block, count, first, rows)
                self._sum(lane + start, blocks, count, first, rows)

    def _score(self, position: Expr, query: Expr, block: Expr, count: Expr, first: int, rows: int) -> None:
        """Scores of one block of positions; what lies beyond `count` counts for nothing."""
        plan, lanes, vectors = self.plan, self.plan.lanes, self.operands.vectors
        columns = plan.score_columns(rows)
        keys = T.bind((position + block * BLOCK) * plan.head_dim)
        with T.serial(0, plan.block_vectors // columns) as part:
            half = T.bind(part * columns)
            sums = Sums(lanes, rows, columns)
            sums.fill(lambda row, column: float_vector(0.0, lanes))
            with T.serial(0, plan.head_dim) as d:
                sums.add(
                    vectors.add_product,
                    lambda row: self.operands.q[query + (first + row) * plan.head_dim + d],
                    lambda column: read_cached(
                        vectors, plan.kind, self.operands.key, keys + d * BLOCK + (half + column) * lanes
                    ),
                )
            for column, group in enumerate(sums.groups):
                place = block * BLOCK + (half + column) * lanes
                end = T.bind(T.broadcast(T.cast(count, "int32"), lanes))
                seen = T.ramp(T.cast(place, "int32"), 1, lanes) < end
                if plan.kind.scaled:
                    scale = T.bind(load(self.operands.scales[0], position + place, lanes))
                for row in range(rows):
                    score = group[row] * scale if plan.kind.scaled else group[row]
                    masked = T.Select(seen, score, float_vector(LOWEST, lanes))
                    store(self.scores, (first + row) * UNIT + place, masked, lanes)

    def _sum(self, position: Expr, blocks: Expr, count: Expr, first: int, rows: int) -> None:
        """Softmax of the unit's scores and the sum of its values."""
        plan, lanes, operands = self.plan, self.plan.lanes, self.operands

        def weigh(weights: Expr, number: Expr) -> Expr:
            if not plan.kind.scaled:
                return weights
            return weights * load(operands.scales[1], position + number * lanes, lanes)

        def value(s: Expr, column: Expr) -> Expr:
            return read_cached(operands.vectors, plan.kind, operands.value, (position + s) * plan.width + column)

        scores = Scores(self.scores, self.factors, first * UNIT, UNIT)
        soften(self.state, first, rows, scores, blocks * plan.block_vectors, weigh)
        products = Products(
            count,
            operands.vectors.add_product,
            lambda row: load(self.factors, row * lanes, lanes),
            lambda row, s: self.scores[scores.place(row, s)],
            value,
        )
        gather(self.state, first, rows, products)


def _write(operands: Operands, state: State, segment: Expr, head: Expr) -> None:
    """The group's rows of one segment to y."""
    plan = operands.plan
    token = T.cast(operands.segments[segment * 4 + 1], "int64")
    with T.serial(0, plan.group) as row:
        state.write(operands.y, ((token * plan.kv_heads + head) * plan.group + row) * plan.head_dim, row)


def _merge(operands: Operands, line: _Line, total: Expr, workers: Expr, partial: State) -> None:
    """Heads that several threads worked on."""
    group = operands.plan.group
    state = State(operands.plan, group)
    passed, found = T.alloc_buffer((1,), "int64"), T.alloc_buffer((1,), "int64")
    T.buffer_store(passed, T.int64(0), [0])
    with T.serial(0, operands.segment_count) as segment:
        units = T.bind(line.units(segment))
        with T.serial(0, operands.plan.kv_heads) as head:
            T.buffer_store(found, T.int64(0), [0])
            with T.serial(0, workers) as worker:
                start, stop = _bounds(total, workers, worker)
                low, high = T.bind(T.max(start, passed[0])), T.bind(T.min(stop, passed[0] + units))
                with T.If(tirx.all(low < high, high - low < units)), T.Then():
                    with T.If(found[0] == 0), T.Then():
                        state.clear(0, group)
                    T.buffer_store(found, T.int64(1), [0])
                    slot = T.bind((worker * 2 + T.cast(low == passed[0], "int64")) * group)
                    with T.serial(0, group) as row:
                        state.merge(row, partial, slot + row)
            with T.If(found[0] > 0), T.Then():
                _write(operands, state, segment, head)
            T.buffer_store(passed, passed[0] + units, [0])
