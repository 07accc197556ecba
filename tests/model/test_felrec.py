"""FELRec-Q and FELRec-P: sizes, closed forms of the losses, and where the gradient may not go."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from felrec_dist.model.felrec import (
    EncoderInputs,
    FELRec,
    FELRecP,
    FELRecQ,
    Head,
    ModelConfig,
    ModelOutput,
    _disagreement,
    build_model,
)
from tests.model.inputs import (
    D,
    encoder_inputs,
    model_config,
    normal,
    packed,
    slice_inputs,
)

BATCH = 6


def build_q(**changes: object) -> FELRecQ:
    torch.manual_seed(0)
    model = build_model(model_config("felrec-q", **changes)).double()
    assert isinstance(model, FELRecQ)
    return model


def build_p() -> FELRecP:
    torch.manual_seed(0)
    model = build_model(model_config("felrec-p")).double()
    assert isinstance(model, FELRecP)
    return model


def answer_always(head: nn.Module, vector_D: Tensor) -> None:
    """Makes a head ignore its input."""
    assert isinstance(head, Head)
    with torch.no_grad():
        head.linear2.weight.zero_()
        head.linear2.bias.copy_(vector_D)


@pytest.mark.parametrize(("variant", "count"), [("felrec-q", 479_488), ("felrec-p", 580_096)])
def test_number_of_parameters_of_table_1(variant: str, count: int) -> None:
    model = build_model(ModelConfig.model_validate({"variant": variant}))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


class TestFELRecQ:
    @pytest.mark.parametrize("temperature", [0.07, 1.0])
    @pytest.mark.parametrize("queue_size", [1, 7])
    def test_uniform_representations_give_the_loss_of_chance(
        self, queue_size: int, temperature: float
    ) -> None:
        model = build_q(queue_size=queue_size, temperature=temperature)
        unit_D = F.normalize(normal(1, D), dim=0)
        answer_always(model.user_projection, unit_D)
        answer_always(model.item_projection, unit_D)
        model.user_queue.entries_KD.copy_(unit_D)
        model.item_queue.entries_KD.copy_(unit_D)
        output = model(encoder_inputs(0, BATCH))
        for branch in (output.user_loss, output.item_loss):
            assert branch.item() == pytest.approx(math.log(queue_size + 1), rel=1e-12)
        assert model.chance_loss(BATCH) == pytest.approx(math.log(queue_size + 1), rel=1e-15)

    def test_uniform_representations_against_the_batch(self) -> None:
        model = build_q(negatives="batch")
        answer_always(model.user_projection, normal(1, D))
        answer_always(model.item_projection, normal(2, D))
        output = model(encoder_inputs(0, BATCH))
        assert output.loss.item() == pytest.approx(2 * math.log(BATCH), rel=1e-12)
        assert model.chance_loss(BATCH) == pytest.approx(math.log(BATCH), rel=1e-15)

    def test_each_branch_contrasts_with_the_other_sides_queue(self) -> None:
        """A positive of cosine 1; item queue orthogonal to it, user queue opposite."""
        temperature, size = 0.5, 7
        model = build_q(queue_size=size, temperature=temperature)
        axis_DD = torch.eye(D, dtype=torch.float64)
        answer_always(model.user_projection, 3.0 * axis_DD[0])
        answer_always(model.item_projection, 5.0 * axis_DD[0])
        model.item_queue.entries_KD.copy_(axis_DD[1])
        model.user_queue.entries_KD.copy_(-axis_DD[0])
        output = model(encoder_inputs(0, BATCH))
        expected_user = math.log(1 + size * math.exp((0 - 1) / temperature))
        expected_item = math.log(1 + size * math.exp((-1 - 1) / temperature))
        assert output.user_loss.item() == pytest.approx(expected_user, rel=1e-12)
        assert output.item_loss.item() == pytest.approx(expected_item, rel=1e-12)
        assert output.loss.item() == pytest.approx(expected_user + expected_item, rel=1e-12)

    def test_the_batch_is_contrasted_with_itself_event_by_event(self) -> None:
        model = build_q(negatives="batch", temperature=0.3)
        output = model(encoder_inputs(0, BATCH))
        p_user_BD, p_item_BD = output.projections_BD
        terms = []
        for event in range(BATCH):
            logits_B = p_item_BD @ p_user_BD[event] / 0.3
            terms.append(torch.logsumexp(logits_B, dim=0) - logits_B[event])
        torch.testing.assert_close(output.user_loss, torch.stack(terms).mean())

    def test_projections_are_unit_vectors_and_go_to_their_own_queue_after_the_loss(self) -> None:
        model = build_q()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        output = model(encoder_inputs(0, BATCH))
        assert torch.equal(model.user_queue.entries_KD, before["user_queue.entries_KD"])
        assert torch.equal(model.item_queue.entries_KD, before["item_queue.entries_KD"])
        p_user_BD, p_item_BD = output.projections_BD
        ones_B = torch.ones(BATCH, dtype=torch.float64)
        torch.testing.assert_close(p_user_BD.norm(dim=1), ones_B)
        torch.testing.assert_close(p_item_BD.norm(dim=1), ones_B)
        model.push_queues(*output.projections_BD)
        assert torch.equal(model.user_queue.entries_KD[:BATCH], p_user_BD)
        assert torch.equal(model.item_queue.entries_KD[:BATCH], p_item_BD)
        assert torch.equal(
            model.user_queue.entries_KD[BATCH:], before["user_queue.entries_KD"][BATCH:]
        )

    @pytest.mark.parametrize("negatives", ["queue", "batch"])
    def test_gradient_stops_at_the_keys(self, negatives: str) -> None:
        model = build_q(negatives=negatives)
        inputs = encoder_inputs(0, BATCH)

        def branch(queries: str, *, stop: bool) -> Tensor:
            user_BD, item_BD = model.represent(inputs)
            p_user_BD = F.normalize(model.user_projection(user_BD), dim=1)
            p_item_BD = F.normalize(model.item_projection(item_BD), dim=1)
            query_BD, key_BD, queue = (
                (p_user_BD, p_item_BD, model.item_queue)
                if queries == "user"
                else (p_item_BD, p_user_BD, model.user_queue)
            )
            key_BD = key_BD.detach() if stop else key_BD
            positive_B1 = (query_BD * key_BD).sum(dim=1, keepdim=True)
            if negatives == "queue":
                logits = torch.cat([positive_B1, query_BD @ queue.entries_KD.T], dim=1)
                target_B = torch.zeros(BATCH, dtype=torch.int64)
            else:
                logits, target_B = query_BD @ key_BD.T, torch.arange(BATCH)
            return F.cross_entropy(logits / model.temperature, target_B)

        _check_gradients(
            model,
            inputs,
            lambda: branch("user", stop=True) + branch("item", stop=True),
            lambda: branch("user", stop=False) + branch("item", stop=False),
        )


class TestFELRecP:
    def test_known_disagreements(self) -> None:
        x_Bd = normal(0, BATCH, 4)
        assert _disagreement(x_Bd, 3.0 * x_Bd).item() == pytest.approx(0.0, abs=1e-12)
        assert _disagreement(x_Bd, -x_Bd).item() == pytest.approx(4.0, rel=1e-12)
        axis_dd = torch.eye(4, dtype=torch.float64)
        assert _disagreement(axis_dd[:2], axis_dd[2:]).item() == pytest.approx(2.0, rel=1e-12)
        half = torch.cat([x_Bd[:3], -x_Bd[3:]])
        assert _disagreement(x_Bd, half).item() == pytest.approx(2.0, rel=1e-12)

    @pytest.mark.parametrize(("sign", "expected"), [(1.0, 0.0), (-1.0, 4.0)])
    def test_agreement_and_opposition_of_each_side(self, sign: float, expected: float) -> None:
        model = build_p()
        user_d, item_d = normal(1, D // 2), normal(2, D // 2)
        answer_always(model.user_projection, user_d)
        answer_always(model.item_projection, item_d)
        # Each side predicts the *other* side's projection.
        answer_always(model.user_prediction, sign * item_d)
        answer_always(model.item_prediction, sign * user_d)
        output = model(encoder_inputs(0, BATCH))
        assert output.user_loss.item() == pytest.approx(expected, abs=1e-12)
        assert output.item_loss.item() == pytest.approx(expected, abs=1e-12)
        assert output.loss.item() == pytest.approx(2 * expected, abs=1e-12)

    @pytest.mark.parametrize("seed", range(3))
    def test_the_loss_lies_between(self, seed: int) -> None:
        output = build_p()(encoder_inputs(seed, BATCH))
        assert 0.0 < output.user_loss < 4.0
        assert 0.0 < output.item_loss < 4.0

    def test_has_no_queue_and_no_loss_of_chance(self) -> None:
        model = build_p()
        output = model(encoder_inputs(0, BATCH))
        assert output.projections_BD == ()
        model.push_queues(*output.projections_BD)
        assert model.chance_loss(BATCH) is None
        with pytest.raises(AssertionError, match="no queues"):
            model.push_queues(output.user_BD)

    def test_gradient_stops_at_the_targets(self) -> None:
        model = build_p()
        inputs = encoder_inputs(0, BATCH)

        def loss(*, stop: bool) -> Tensor:
            user_BD, item_BD = model.represent(inputs)
            p_user_Bd, p_item_Bd = model.user_projection(user_BD), model.item_projection(item_BD)
            z_user_Bd, z_item_Bd = (
                F.normalize(model.user_prediction(p_user_Bd), dim=1),
                F.normalize(model.item_prediction(p_item_Bd), dim=1),
            )
            targets = [p.detach() if stop else p for p in (p_item_Bd, p_user_Bd)]
            user_cos_B = (z_user_Bd * F.normalize(targets[0], dim=1)).sum(dim=1)
            item_cos_B = (z_item_Bd * F.normalize(targets[1], dim=1)).sum(dim=1)
            return 4.0 - 2.0 * user_cos_B.mean() - 2.0 * item_cos_B.mean()

        _check_gradients(model, inputs, lambda: loss(stop=True), lambda: loss(stop=False))


def _check_gradients(
    model: FELRec,
    inputs: EncoderInputs,
    expected_loss: Callable[[], Tensor],
    leaking_loss: Callable[[], Tensor],
) -> None:
    """The model's gradient is that of the loss by hand, and not of the one that lets it through."""
    output = model(inputs)
    found = _gradients(model, output.loss)
    torch.testing.assert_close(output.loss, expected_loss())
    assert any(gradient.abs().max() > 1e-3 for gradient in found.values())
    for name, expected in _gradients(model, expected_loss()).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12, msg=name)
    leaking = _gradients(model, leaking_loss())
    name = "encoder.output.weight"
    assert not torch.allclose(found[name], leaking[name], rtol=1e-3)


def _gradients(model: FELRec, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("variant", ["felrec-q", "felrec-p"])
def test_what_leaves_the_model_carries_no_gradient(variant: str) -> None:
    model = build_model(model_config(variant)).double()
    output: ModelOutput = model(encoder_inputs(0, BATCH))
    assert output.loss.requires_grad
    for tensor in (output.user_loss, output.item_loss, *output.exchanged()):
        assert not tensor.requires_grad
    assert torch.equal(output.exchanged()[0], output.user_BD)
    assert torch.equal(output.exchanged()[1], output.item_BD)


def test_types_are_those_of_the_ids_in_the_history() -> None:
    """A user's history holds items: only the item type embedding moves the user."""
    model = build_p().eval()
    inputs = encoder_inputs(0, BATCH)
    user_BD, item_BD = model.represent(inputs)
    with torch.no_grad():
        model.item_type_embedding.copy_(normal(9, D))
    moved_user_BD, same_item_BD = model.represent(inputs)
    assert torch.equal(same_item_BD, item_BD)
    assert not torch.allclose(moved_user_BD, user_BD)


@pytest.mark.parametrize("has_identity", [False, True])
def test_unseen_items_are_items_without_history(has_identity: bool) -> None:
    model = build_p().eval()
    identity_BD = normal(3, BATCH, D) if has_identity else None
    found_BD = model.represent_unseen_items(BATCH, identity_BD)
    inputs = EncoderInputs(
        items_of_users_BSD=normal(4, BATCH, 2, D),
        users=packed([1] * BATCH),
        users_of_items_BSD=normal(5, BATCH, 2, D),
        items=packed([0] * BATCH),
        item_identity_BD=identity_BD,
    )
    torch.testing.assert_close(found_BD, model.represent(inputs)[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(found_BD, found_BD[:1].expand(BATCH, D)) != has_identity


SHARED: dict[str, object] = {"projection": "shared"}
NONE: dict[str, object] = {"projection": "none"}
LAYER: dict[str, object] = {"head_norm": "layer"}
NO_TYPE: dict[str, object] = {"type_embedding": False}
ABLATIONS: list[tuple[str, dict[str, object], int, str]] = [
    ("felrec-q", LAYER, 479_488, "felrec-q-LN"),
    ("felrec-q", NONE, 479_488 - 2 * 33_280, "felrec-q-NoMLP"),
    ("felrec-q", SHARED, 479_488 - 33_280, "felrec-q-shareMLP"),
    ("felrec-q", NO_TYPE, 479_488 - 2 * 128, "felrec-q-NoType"),
    ("felrec-p", LAYER, 580_096, "felrec-p-LN"),
    # Without projections the predictions are 128 -> 256 -> 128, not 64 -> 256 -> 64.
    ("felrec-p", NONE, 580_096 - 2 * 49_984 + 2 * (66_432 - 33_600), "felrec-p-NoMLP"),
    ("felrec-p", SHARED | NO_TYPE, 580_096 - 49_984 - 2 * 128, "felrec-p-shareMLP-NoType"),
]


@pytest.mark.parametrize(("variant", "changes", "count", "name"), ABLATIONS)
def test_ablations_have_names_and_fewer_parameters(
    variant: str, changes: dict[str, object], count: int, name: str
) -> None:
    config = ModelConfig.model_validate({"variant": variant, **changes})
    model = build_model(config)
    assert config.name == name
    assert model.num_parameters == count
    names = [parameter for parameter, _ in model.named_parameters()]
    assert any("type_embedding" in name for name in names) == config.type_embedding
    assert any("batchnorm" in name for name in names) == (
        config.head_norm == "batch" and any("linear1" in name for name in names)
    )
    # Two names for one tensor cannot be saved.
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize(("variant", "changes", "count", "name"), ABLATIONS)
def test_ablations_learn(variant: str, changes: dict[str, object], count: int, name: str) -> None:
    torch.manual_seed(0)
    model = build_model(model_config(variant, **changes)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    inputs = encoder_inputs(0, BATCH)
    losses = []
    for _ in range(40):
        output = model(inputs)
        assert output.user_BD.shape == output.item_BD.shape == (BATCH, D)
        assert [p.shape for p in output.projections_BD] == [(BATCH, D)] * len(output.projections_BD)
        losses.append(output.loss.item())
        optimizer.zero_grad()
        output.loss.backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, parameter_name
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    with torch.no_grad():
        for vectors in (
            model.compared_users(output.user_BD),
            model.compared_items(output.item_BD),
        ):
            torch.testing.assert_close(vectors.norm(dim=1), torch.ones_like(vectors[:, 0]))


def test_a_shared_projection_learns_from_both_sides() -> None:
    """Its gradient is the sum of those that two equal projections get, one of each side."""
    shared, separate = build_q(projection="shared"), build_q()
    state = shared.state_dict()
    copied = {name.replace("user_projection", "item_projection"): t for name, t in state.items()}
    separate.load_state_dict({**copied, **state})
    inputs = encoder_inputs(0, BATCH)
    found = _gradients(shared, shared(inputs).loss)
    apart = _gradients(separate, separate(inputs).loss)
    for name, gradient in found.items():
        if not name.startswith("user_projection"):
            continue
        other = apart[name.replace("user_projection", "item_projection")]
        assert other.abs().max() > 1e-6 or "linear1.bias" in name
        torch.testing.assert_close(gradient, apart[name] + other, rtol=1e-9, atol=1e-12)


def test_without_projection_the_representations_are_contrasted() -> None:
    model = build_q(projection="none")
    output = model(encoder_inputs(0, BATCH))
    for projection_BD, row_BD in zip(
        output.projections_BD, (output.user_BD, output.item_BD), strict=True
    ):
        torch.testing.assert_close(projection_BD, F.normalize(row_BD, dim=1))


@pytest.mark.parametrize(("changes", "is_alone"), [(LAYER, True), ({}, False)])
def test_with_layernorm_events_do_not_see_each_other(
    changes: dict[str, object], is_alone: bool
) -> None:
    model = build_q(**changes)
    inputs = encoder_inputs(0, BATCH)
    whole = model(inputs).projections_BD[0][:2]
    part = model(slice_inputs(inputs, 0, 2)).projections_BD[0]
    assert torch.allclose(whole, part, rtol=1e-9) == is_alone


def test_without_types_both_sides_read_their_histories_alike() -> None:
    model = build_q(type_embedding=False).eval()
    inputs = encoder_inputs(0, BATCH)
    swapped = EncoderInputs(
        items_of_users_BSD=inputs.users_of_items_BSD,
        users=inputs.items,
        users_of_items_BSD=inputs.items_of_users_BSD,
        items=inputs.users,
    )
    assert torch.equal(model.represent(inputs)[0], model.represent(swapped)[1])


def test_a_model_without_heads_has_no_norm() -> None:
    with pytest.raises(ValueError, match="felrec-q without projection has no heads"):
        model_config("felrec-q", **NONE, **LAYER)
    assert model_config("felrec-p", **NONE, **LAYER).name == "felrec-p-LN-NoMLP"


def test_one_seed_gives_one_model() -> None:
    first, second = build_q(), build_q()
    for (name, a), (_, b) in zip(
        first.state_dict().items(), second.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
