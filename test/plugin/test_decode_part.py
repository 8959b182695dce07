"""A part of a batch is prepared, the whole follows, and what it says of the others stays."""

from types import SimpleNamespace

import pytest
import torch
from sglang_psa.decode_part import is_part, prepare_part, take_part

VOCAB = 7


class Request:
    """What batches and penalizers ask of a request."""

    return_logprob = False
    return_hidden_states = False
    grammar = None

    def __init__(self, slot, **sampling):
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode

        self.return_hidden_states_mode = CaptureHiddenMode.NULL
        defaults = dict(
            frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0, min_new_tokens=0
        )
        self.sampling_params = SimpleNamespace(
            **{**defaults, **sampling}, stop_token_ids=None, top_k=1
        )
        self.tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=0)
        self.slot = slot
        self.output_ids = []


def make_batch(reqs, lengths):
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.sampling import penaltylib
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    slots = torch.tensor([req.slot for req in reqs])
    lengths = torch.tensor(lengths)
    batch = ScheduleBatch(
        reqs=reqs,
        device="cpu",
        model_config=SimpleNamespace(is_encoder_decoder=False),
        req_pool_indices=slots,
        req_pool_indices_cpu=slots.clone(),
        seq_lens=lengths,
        seq_lens_cpu=lengths.clone(),
        orig_seq_lens=lengths.int(),
    )
    kinds = {
        penaltylib.BatchedFrequencyPenalizer,
        penaltylib.BatchedMinNewTokensPenalizer,
        penaltylib.BatchedPresencePenalizer,
        penaltylib.BatchedRepetitionPenalizer,
    }
    numbers = torch.arange(len(reqs), dtype=torch.float32)
    batch.sampling_info = SamplingBatchInfo(
        temperatures=numbers.view(-1, 1),
        top_ps=numbers,
        top_ks=numbers.int(),
        min_ps=numbers,
        is_all_greedy=True,
        is_any_greedy=True,
        need_top_p_sampling=False,
        need_top_k_sampling=False,
        need_min_p_sampling=False,
        vocab_size=VOCAB,
        device="cpu",
        penalizer_orchestrator=penaltylib.BatchedPenalizerOrchestrator(VOCAB, batch, kinds),
    )
    return batch


@pytest.fixture(autouse=True)
def preparation(monkeypatch):
    """SGLang's preparation of a step without its allocation of slots."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    def prepare(batch):
        batch.forward_mode = "decode"
        if batch.sampling_info.penalizer_orchestrator.is_required:
            batch.cumulate_penalty_output_tokens()
        batch.seq_lens = batch.seq_lens + 1
        batch.seq_lens_cpu = batch.seq_lens_cpu + 1
        batch.orig_seq_lens = batch.orig_seq_lens + 1

    monkeypatch.setattr(ScheduleBatch, "prepare_for_decode", prepare)


def penalties(batch):
    """Additive and scaling penalties of each row."""
    info = batch.sampling_info
    info.update_penalties()
    empty = torch.zeros(len(batch.reqs), VOCAB)
    added, scaled = info.acc_additive_penalties, info.acc_scaling_penalties
    return (empty if added is None else added), (empty + 1 if scaled is None else scaled)


SAMPLING = [
    dict(frequency_penalty=0.5, min_new_tokens=3),
    dict(),
    dict(presence_penalty=1.5),
    dict(repetition_penalty=1.25, min_new_tokens=2),
]


def test_the_part_has_its_rows_and_the_whole_all():
    whole = make_batch([Request(slot) for slot in (5, 6, 7)], [10, 20, 30])
    before = whole.seq_lens
    part = take_part(whole, [2, 0])
    assert is_part(part) and not is_part(whole)
    prepare_part(whole, part, [2, 0])
    assert [req.slot for req in part.reqs] == part.req_pool_indices.tolist() == [7, 5]
    assert part.seq_lens.tolist() == part.seq_lens_cpu.tolist() == [31, 11]
    assert part.sampling_info.temperatures.flatten().tolist() == [2, 0]
    for lengths in (whole.seq_lens, whole.seq_lens_cpu, whole.orig_seq_lens):
        assert lengths.tolist() == [11, 20, 31]
    assert whole.seq_lens.dtype == torch.int64 and whole.orig_seq_lens.dtype == torch.int32
    assert before.tolist() == [10, 20, 30], "a forward pass under way may read it"
    assert len(whole.reqs) == len(whole.sampling_info) == 3
    assert whole.forward_mode == part.forward_mode == "decode"


def test_penalties_are_those_of_requests_that_decode_alone():
    steps = [[0, 1], [2, 3], [0, 3], [1, 2], [0, 2, 3], [1], [3]]
    whole = make_batch([Request(i, **SAMPLING[i]) for i in range(4)], [9] * 4)
    alone = [make_batch([Request(i, **SAMPLING[i])], [9]) for i in range(4)]
    random = torch.Generator().manual_seed(0)
    for rows in steps:
        for row in rows:
            token = int(torch.randint(VOCAB, (1,), generator=random))
            whole.reqs[row].output_ids.append(token)
            alone[row].reqs[0].output_ids.append(token)
            alone[row].prepare_for_decode()
        part = take_part(whole, rows)
        prepare_part(whole, part, rows)
        want = [penalties(alone[row]) for row in rows]
        for kind, found in enumerate(penalties(part)):
            torch.testing.assert_close(found, torch.cat([one[kind] for one in want]))
        want = [penalties(one) for one in alone]
        for kind, found in enumerate(penalties(whole)):
            torch.testing.assert_close(found, torch.cat([one[kind] for one in want]))
    assert whole.seq_lens.tolist() == [one.seq_lens.item() for one in alone]


def test_the_whole_can_be_filtered_and_merged_after_a_part():
    whole = make_batch([Request(i, **SAMPLING[i]) for i in range(4)], [9] * 4)
    for req in whole.reqs:
        req.output_ids.append(req.slot)
    prepare_part(whole, take_part(whole, [1, 3]), [1, 3])
    whole.filter_batch(keep_indices=[0, 3])
    whole.merge_batch(make_batch([Request(8, frequency_penalty=1.0)], [4]))
    assert whole.seq_lens.tolist() == [9, 10, 4]
    _, scaled = penalties(whole)
    assert scaled[1, 3] == 1.25 and scaled.sum() == 3 * VOCAB + 0.25
