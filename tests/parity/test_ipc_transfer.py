"""What can be said of the CUDA IPC transfer without CUDA: that our engine replaces methods which vLLM's still has."""

from mcore_rl.rollout.transfer.backends import IPCTrainerWeightTransferEngine, Rank0IpcEngine


def test_the_replaced_methods_exist_upstream():
    for name in ("_all_gather_and_merge_handles", "_post_send_sync", "send_weights", "trainer_init"):
        assert name in vars(IPCTrainerWeightTransferEngine) and name in vars(Rank0IpcEngine), name


def test_ranks_without_the_tensors_take_part_in_gathering_them():
    """vLLM's own engine would read attributes of the None that they hold."""
    engine, seen = object.__new__(Rank0IpcEngine), []
    engine.is_sender = False
    engine.source = ((seen.append(name) or name, None) for name in ("a", "b"))
    engine.send_weights()
    assert seen == ["a", "b"]
