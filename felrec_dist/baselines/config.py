"""What the baselines can be set to; the defaults are the paper's sizes."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from felrec_dist.model.encoder import EncoderConfig
from felrec_dist.section import Section


class TablesConfig(Section):
    """The sharded tables of trained vectors; FELRec has none."""

    update: Literal["exact", "fused"] = Field(
        "exact",
        description="exact: the run's optimizer, as if the table were one dense parameter; "
        "fused: SGD or row-wise Adagrad inside the backward pass, whose cost does not grow with "
        "the table",
    )
    fused_optimizer: Literal["sgd", "rowwise_adagrad"] = "rowwise_adagrad"
    fused_lr: float = Field(0.01, gt=0.0, description="at the schedule's base_lr, and follows it")
    initial_std: float = Field(
        0.02, gt=0.0, description="standard deviation of the initial vectors"
    )


class BPRMFConfig(Section):
    """Matrix factorisation (Rendle 2009)."""

    serves_new_items: ClassVar[bool] = False
    variant: Literal["bpr-mf"]
    width: int = Field(128, ge=4, multiple_of=4, description="D; tables want a multiple of 4")
    num_negatives: int = Field(1, ge=1, description="of each event")

    def cache_widths(self) -> dict[str, int]:
        """Nothing is kept of anybody."""
        return {}


class NextItemConfig(Section):
    """What the models have in common that predict a history's items one after the other."""

    serves_new_items: ClassVar[bool] = False
    loss: Literal["bpr", "softmax", "sampled-softmax"] = Field(
        "bpr", description="bpr as released; with a softmax these models are far stronger"
    )
    num_negatives: int = Field(
        8, ge=1, description="bpr: of each position; sampled-softmax: of the batch, for all of it"
    )

    def cache_widths(self) -> dict[str, int]:
        """Nothing is kept: each event reads its own history."""
        return {}


class SASRecConfig(NextItemConfig):
    """A causal Transformer over the user's items (Kang & McAuley 2018)."""

    variant: Literal["sasrec"]
    encoder: EncoderConfig = EncoderConfig()

    @field_validator("encoder")
    @classmethod
    def _tables_take_the_width(cls, encoder: EncoderConfig) -> EncoderConfig:
        if encoder.width % 4:
            raise ValueError(f"width = {encoder.width} must be a multiple of 4")
        return encoder


class GRU4RecBPTTConfig(NextItemConfig):
    """GRUs over the user's items, with back-propagation through the whole window."""

    variant: Literal["gru4rec-bptt"]
    history_length: int = Field(64, ge=1, description="N, items of a window")
    width: int = Field(128, ge=4, multiple_of=4, description="D; tables want a multiple of 4")
    num_layers: int = Field(3, ge=1)


class GRU4RecConfig(Section):
    """GRUs that go on from event to event (Hidasi 2016); the state of a user is kept."""

    serves_new_items: ClassVar[bool] = False
    variant: Literal["gru4rec"]
    width: int = Field(128, ge=4, multiple_of=4, description="D; tables want a multiple of 4")
    num_layers: int = Field(3, ge=1)
    num_negatives: int = Field(8, ge=1, description="of each event")
    sessions: Literal["carry-over", "released"] = Field(
        "carry-over",
        description="released: a user's session begins anew with the first event of an evaluation",
    )

    def cache_widths(self) -> dict[str, int]:
        """The hidden states of a user's layers, one after the other."""
        return {"user": self.num_layers * self.width}


class JODIEConfig(Section):
    """Two RNNs that update a user's and an item's state at each event (Kumar 2019)."""

    serves_new_items: ClassVar[bool] = True
    variant: Literal["jodie", "jodie-released"]
    width: int = Field(128, ge=4, multiple_of=4, description="D; tables want a multiple of 4")

    def cache_widths(self) -> dict[str, int]:
        """The dynamic vectors and whether there are any; for ``jodie`` also what each was made of:
        state before, partner's state, elapsed time, and the time of the last event in three.
        """
        row_width = self.width + 1 if self.variant == "jodie-released" else 3 * self.width + 5
        return dict.fromkeys(("user", "item"), row_width)
