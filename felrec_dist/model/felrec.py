"""FELRec-Q and FELRec-P (Weimann & Conrad, arXiv 2210.16928, sections 4.2-4.4).

Shape legend: B batch, S slots, D width, K queue size. Both models encode the user's recent items
and the item's recent users with one encoder and train the two representations to agree; the
gradient never reaches the cache. They differ in how they keep the representations from collapsing:
Q contrasts with a queue of earlier projections (MoCo), P predicts the other side's projection
behind a stop-gradient (BYOL, SimSiam).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from felrec_dist.model.batchnorm import WholeBatchNorm, normalise_together
from felrec_dist.model.collective import gather_ranks, num_ranks, rank
from felrec_dist.model.encoder import EncoderConfig, HistoryEncoder
from felrec_dist.model.packing import Packing, pack
from felrec_dist.model.queue import ProjectionQueue
from felrec_dist.section import Section


class ModelConfig(Section):
    """What is trained."""

    variant: Literal["felrec-q", "felrec-p"] = "felrec-q"
    encoder: EncoderConfig = EncoderConfig()
    queue_size: int = Field(8192, ge=1, description="K; FELRec-Q only")
    temperature: float = Field(0.07, gt=0.0, description="FELRec-Q only")
    negatives: Literal["queue", "batch"] = Field(
        "queue", description="FELRec-Q: the paper's queue, or the other events of the batch"
    )
    empty_slot: Literal["zero", "identity"] = Field(
        "zero",
        description="what closes a short history: zero as in the paper, or a fixed vector "
        "of the user or item itself",
    )
    absent_row: Literal["zero", "identity"] = Field(
        "zero", description="what an id reads as that the cache has never seen"
    )
    head_norm: Literal["batch", "layer"] = Field(
        "batch", description="normalisation in the heads; layer is the paper's ablation LN"
    )
    projection: Literal["separate", "shared", "none"] = Field(
        "separate",
        description="of users and items; the paper's ablations shareMLP (shared) and NoMLP (none)",
    )
    type_embedding: bool = Field(
        True, description="of the ids in a history; without is the paper's ablation NoType"
    )

    @model_validator(mode="after")
    def _has_what_is_normalised(self) -> ModelConfig:
        if (self.variant, self.projection, self.head_norm) == ("felrec-q", "none", "layer"):
            raise ValueError("head_norm must be batch: felrec-q without projection has no heads")
        return self

    @property
    def name(self) -> str:
        """The variant and its ablations, in the paper's words."""
        ablations = {
            "LN": self.head_norm == "layer",
            "NoMLP": self.projection == "none",
            "shareMLP": self.projection == "shared",
            "NoType": not self.type_embedding,
        }
        return "-".join([self.variant, *(name for name, is_on in ablations.items() if is_on)])

    def cache_widths(self) -> dict[str, int]:
        """Returns the width of the rows kept of each side."""
        return dict.fromkeys(("user", "item"), self.encoder.width)


@dataclass(frozen=True)
class EncoderInputs:
    """The histories of a slice of the batch, as read from the cache.

    Attributes:
        items_of_users_BSD: representations of each event's user's recent items, most recent first.
        users: the lengths of the user histories, as groups.
        users_of_items_BSD: representations of each event's item's recent users.
        items: the lengths of the item histories.
        user_identity_BD, item_identity_BD: what fills the empty slots; None for zero.
        dropout_keys_2B: of ``dropout_keys``, the users' and the items'; None outside of training.
    """

    items_of_users_BSD: Tensor
    users: Packing
    users_of_items_BSD: Tensor
    items: Packing
    user_identity_BD: Tensor | None = None
    item_identity_BD: Tensor | None = None
    dropout_keys_2B: Tensor | None = None


@dataclass(frozen=True)
class ModelOutput:
    """The loss and what goes to the other ranks, the cache and the queue (detached).

    Attributes:
        loss: scalar, sum of the branches, mean over the slice.
        user_loss, item_loss: the two branches, detached.
        user_BD, item_BD: representations, as they are written to the cache.
        projections_BD: what the queues take, of users and of items; empty for FELRec-P.
    """

    loss: Tensor
    user_loss: Tensor
    item_loss: Tensor
    user_BD: Tensor
    item_BD: Tensor
    projections_BD: tuple[Tensor, ...] = ()

    def exchanged(self) -> tuple[Tensor, ...]:
        """Returns what the ranks send each other: both representations, then the projections."""
        return (self.user_BD, self.item_BD, *self.projections_BD)


class FELRec(nn.Module):
    """Encoder and type embeddings: all that evaluation needs.

    Attributes:
        uses_bfloat16: whether the encoder's matrix products are of bfloat16; what it gives has the
            model's type all the same.
    """

    uses_bfloat16 = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.encoder.width
        self.encoder = HistoryEncoder(config.encoder)
        # The type of the ids *in* the history: items in a user's history, users in an item's.
        self.user_type_embedding: Tensor
        self.item_type_embedding: Tensor
        for name in ("user_type_embedding", "item_type_embedding"):
            if config.type_embedding:
                self.register_parameter(name, nn.Parameter(torch.randn(width)))
            else:
                self.register_buffer(name, torch.zeros(width), persistent=False)

    def _add_projections(self, config: ModelConfig, width_hidden: int, width_out: int) -> int:
        """Builds them and returns the width of what they give."""
        width = config.encoder.width
        if config.projection == "none":
            self.user_projection: nn.Module = nn.Identity()
            self.item_projection: nn.Module = nn.Identity()
            return width
        self.user_projection = Head(width, width_hidden, width_out, config.head_norm)
        if config.projection == "separate":
            self.item_projection = Head(width, width_hidden, width_out, config.head_norm)
        return width_out

    @property
    def _projection_of_items(self) -> nn.Module:
        """A shared projection stands under the users' name alone, as it is saved once."""
        projection: nn.Module = getattr(self, "item_projection", self.user_projection)
        return projection

    def project(self, user_BD: Tensor, item_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the projections of users and items."""
        return apply_heads(self.user_projection, user_BD, self._projection_of_items, item_BD)

    def represent(self, inputs: EncoderInputs) -> tuple[Tensor, Tensor]:
        """Returns the representations of the events' users and items, (B, D) each."""
        keys_2B = inputs.dropout_keys_2B
        user_BD = self._encode(
            inputs.items_of_users_BSD,
            inputs.users,
            self.item_type_embedding,
            inputs.user_identity_BD,
            None if keys_2B is None else keys_2B[0],
        )
        item_BD = self._encode(
            inputs.users_of_items_BSD,
            inputs.items,
            self.user_type_embedding,
            inputs.item_identity_BD,
            None if keys_2B is None else keys_2B[1],
        )
        return user_BD, item_BD

    def represent_unseen_items(self, num_items: int, identity_MD: Tensor | None) -> Tensor:
        """Returns (M, D): the encodings of M items without history.

        Args:
            num_items: M.
            identity_MD: what fills their empty slots; None for zero, which makes them all equal.
        """
        # Equal inputs are encoded once: equal rows of a batch may round differently.
        num_encoded = num_items if identity_MD is not None else 1
        width = self.user_type_embedding.shape[0]
        empty_M1D = self.user_type_embedding.new_zeros(num_encoded, 1, width)
        lengths_M = np.zeros(num_encoded, dtype=np.int64)
        packing = pack(lengths_M, self.encoder.history_length, 0).to(empty_M1D.device)
        encoded_MD = self._encode(empty_M1D, packing, self.user_type_embedding, identity_MD, None)
        return encoded_MD.expand(num_items, width)

    def _encode(
        self,
        history_BSD: Tensor,
        packing: Packing,
        type_D: Tensor,
        empty_BD: Tensor | None,
        dropout_keys_B: Tensor | None,
    ) -> Tensor:
        device_type = history_BSD.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.uses_bfloat16):
            encoded_BD = self.encoder(history_BSD, packing, type_D, empty_BD, dropout_keys_B)
        return cast(Tensor, encoded_BD.to(type_D.dtype))

    def compared_users(self, user_BD: Tensor) -> Tensor:
        """Returns unit vectors (B, C) of users: with those of items their products are what the
        training makes agree, behind the heads.

        For a model in evaluation mode: the heads' BatchNorm takes its running statistics.
        """
        raise NotImplementedError

    def compared_items(self, item_BD: Tensor) -> Tensor:
        """Returns unit vectors (B, C) of items, as ``compared_users`` of users."""
        raise NotImplementedError

    @property
    def num_parameters(self) -> int:
        """What is trained, as the paper's Table 1 counts it: neither the cache nor the queues."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def push_queues(self, *projections_BD: Tensor) -> None:
        """Takes the projections of the whole batch, in event order, after the loss."""
        assert not projections_BD, "this model has no queues"

    def chance_loss(self, batch_size: int) -> float | None:
        """The loss of one branch when all logits are equal; None where there is no such value."""
        return None


class FELRecQ(FELRec):
    """Contrastive: the positive against K queue entries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width = config.encoder.width
        self.temperature = config.temperature
        self.negatives = config.negatives
        self.contrast = (
            self._contrast_with_queue if config.negatives == "queue" else self._contrast_with_batch
        )
        self._add_projections(config, width, width)
        self.user_queue = ProjectionQueue(config.queue_size, width)
        self.item_queue = ProjectionQueue(config.queue_size, width)

    def forward(self, inputs: EncoderInputs) -> ModelOutput:
        user_BD, item_BD = self.represent(inputs)
        p_user_BD, p_item_BD = (F.normalize(p, dim=1) for p in self.project(user_BD, item_BD))
        user_loss = self.contrast(p_user_BD, p_item_BD.detach(), self.item_queue)
        item_loss = self.contrast(p_item_BD, p_user_BD.detach(), self.user_queue)
        return ModelOutput(
            loss=user_loss + item_loss,
            user_loss=user_loss.detach(),
            item_loss=item_loss.detach(),
            user_BD=user_BD.detach(),
            item_BD=item_BD.detach(),
            projections_BD=(p_user_BD.detach(), p_item_BD.detach()),
        )

    def compared_users(self, user_BD: Tensor) -> Tensor:
        return F.normalize(self.user_projection(user_BD), dim=1)

    def compared_items(self, item_BD: Tensor) -> Tensor:
        return F.normalize(self._projection_of_items(item_BD), dim=1)

    def _contrast_with_queue(
        self, query_BD: Tensor, positive_BD: Tensor, queue: ProjectionQueue
    ) -> Tensor:
        """Cross entropy over K + 1 logits, the positive in column 0."""
        query_BD = query_BD / self.temperature  # smaller than the logits
        logits_BK = query_BD @ queue.entries_KD.T
        positive_B1 = (query_BD * positive_BD).sum(dim=1, keepdim=True)
        logits_BK1 = torch.cat([positive_B1, logits_BK], dim=1)
        target_B = torch.zeros(len(query_BD), dtype=torch.int64, device=query_BD.device)
        return F.cross_entropy(logits_BK1, target_B)

    def _contrast_with_batch(
        self, query_BD: Tensor, positive_BD: Tensor, queue: ProjectionQueue
    ) -> Tensor:
        """Cross entropy over the projections of all ranks, one rank's after the other's.

        The ranks' slices are equally long, as they are in training.
        """
        keys_BD = gather_ranks(positive_BD).flatten(0, 1)
        num_local = len(query_BD)
        target_B = torch.arange(num_local, device=query_BD.device) + rank() * num_local
        return F.cross_entropy((query_BD / self.temperature) @ keys_BD.T, target_B)

    def push_queues(self, *projections_BD: Tensor) -> None:
        user_projection_BD, item_projection_BD = projections_BD
        self.user_queue.push(user_projection_BD)
        self.item_queue.push(item_projection_BD)

    def chance_loss(self, batch_size: int) -> float:
        if self.negatives == "batch":
            return math.log(batch_size)
        return math.log(self.item_queue.entries_KD.shape[0] + 1)


class FELRecP(FELRec):
    """Similarity: each side predicts the other side's projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width = config.encoder.width
        projected = self._add_projections(config, 2 * width, width // 2)
        self.user_prediction = Head(projected, 2 * width, projected, config.head_norm)
        self.item_prediction = Head(projected, 2 * width, projected, config.head_norm)

    def forward(self, inputs: EncoderInputs) -> ModelOutput:
        user_BD, item_BD = self.represent(inputs)
        p_user_Bd, p_item_Bd = self.project(user_BD, item_BD)
        of_user_Bd, of_item_Bd = apply_heads(
            self.user_prediction, p_user_Bd, self.item_prediction, p_item_Bd
        )
        user_loss = _disagreement(of_user_Bd, p_item_Bd.detach())
        item_loss = _disagreement(of_item_Bd, p_user_Bd.detach())
        return ModelOutput(
            loss=user_loss + item_loss,
            user_loss=user_loss.detach(),
            item_loss=item_loss.detach(),
            user_BD=user_BD.detach(),
            item_BD=item_BD.detach(),
        )

    def compared_users(self, user_BD: Tensor) -> Tensor:
        """Prediction, then projection: with an item's, the mean of both branches' cosines."""
        p_user_Bd = self.user_projection(user_BD)
        return _unit_pair(self.user_prediction(p_user_Bd), p_user_Bd)

    def compared_items(self, item_BD: Tensor) -> Tensor:
        """Projection, then prediction."""
        p_item_Bd = self._projection_of_items(item_BD)
        return _unit_pair(p_item_Bd, self.item_prediction(p_item_Bd))


class Head(nn.Module):
    """Linear, BatchNorm over the whole batch (or LayerNorm), ReLU, Linear."""

    def __init__(
        self, width_in: int, width_hidden: int, width_out: int, norm: Literal["batch", "layer"]
    ) -> None:
        super().__init__()
        self.norm = norm
        self.linear1 = nn.Linear(width_in, width_hidden)
        if norm == "batch":
            self.batchnorm = WholeBatchNorm(width_hidden)
        else:
            self.layernorm = nn.LayerNorm(width_hidden)
        self.linear2 = nn.Linear(width_hidden, width_out)

    def forward(self, x_BD: Tensor) -> Tensor:
        norm = self.batchnorm if self.norm == "batch" else self.layernorm
        return cast(Tensor, self.linear2(F.relu(norm(self.linear1(x_BD)))))


def apply_heads(
    user_head: nn.Module, user_BD: Tensor, item_head: nn.Module, item_BD: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns what the heads of users and items give; ranks meet once for the batch norms of both.

    Heads may be one and the same, or none (``nn.Identity``).
    """
    heads = [
        head
        for head in (user_head, item_head)
        if isinstance(head, Head) and head.norm == "batch" and head.training
    ]
    if num_ranks() == 1 or len(heads) < 2:
        return user_head(user_BD), item_head(item_BD)
    hidden = [head.linear1(x_BD) for head, x_BD in zip(heads, (user_BD, item_BD), strict=True)]
    normed = normalise_together([head.batchnorm for head in heads], hidden)
    of_users, of_items = (
        head.linear2(F.relu(h_BD)) for head, h_BD in zip(heads, normed, strict=True)
    )
    return of_users, of_items


def _disagreement(prediction_Bd: Tensor, target_Bd: Tensor) -> Tensor:
    """2 - 2 cos, mean over the batch."""
    return 2.0 - 2.0 * F.cosine_similarity(prediction_Bd, target_Bd, dim=1).mean()


def _unit_pair(first_Bd: Tensor, second_Bd: Tensor) -> Tensor:
    """Returns [first | second] (B, 2d), each of them scaled to the length sqrt(1/2)."""
    pair_B2d = torch.cat([F.normalize(first_Bd, dim=1), F.normalize(second_Bd, dim=1)], dim=1)
    return pair_B2d / math.sqrt(2.0)


VARIANTS: Mapping[str, type[FELRecQ] | type[FELRecP]] = {"felrec-q": FELRecQ, "felrec-p": FELRecP}


def build_model(config: ModelConfig) -> FELRecQ | FELRecP:
    """Returns a freshly initialised model; seed torch before."""
    return VARIANTS[config.variant](config)
