"""The raw slices of a traced Llama, between tracing and fusing."""

from dataclasses import dataclass

from exporter.core.canonical import Slice


@dataclass
class TracedModel:
    """The raw slices, in the order the data takes. Weights are inputs, as in the canonical model.

    embedding: input_ids [B, S] -> hidden [B, S, H]; layer: hidden, position_ids [B, S], attention_mask
    [B, 1, S, T] (additive, causal, T = P + S), past_key, past_value [B, Hkv, P, D] -> hidden_out, present_key,
    present_value [B, Hkv, T, D]; head: hidden -> logits [B, S, V].
    """

    embedding: Slice
    layers: list[Slice]
    head: Slice

    @property
    def slices(self) -> list[Slice]:
        return [self.embedding, *self.layers, self.head]
