"""Records what a run did, for `paceline verify-resume` and `paceline parity` to compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.accelerator.stepping import steps_taken

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.accelerator.assembly import RunComponents
    from paceline.accelerator.prepared import Prepared
    from paceline.accelerator.recording.parity import ParityRecorder, Recorded
    from paceline.accelerator.recording.resume import ResumeRecorder
    from paceline.data import ActiveLoaders

    RunRecorder = ParityRecorder | ResumeRecorder


def start_recording(
    components: RunComponents,
    run: Recorded,
    prepared: Prepared,
    loaders: ActiveLoaders,
    finish_save: Callable[[], None],
) -> RunRecorder | None:
    """Record batches from now on, where one of the two commands has started the run.

    Args:
        components: The run.
        run: The Accelerator.
        prepared: What trains.
        loaders: Hand out the batches.
        finish_save: Waits for a checkpoint that is still being written.

    Returns:
        The recorder, to be called with losses, norms and steps; None in any other run.
    """
    recording, group = components.resolved.recording, components.context.group
    if recording is None:
        return None
    # Few runs are recorded.
    from paceline.accelerator.recording.parity import ParityRecorder
    from paceline.accelerator.recording.resume import ResumeRecorder, counted_steps

    recorder: RunRecorder
    if recording.parity:
        recorder = ParityRecorder(recording, group, run, prepared.models, prepared.optimizers)
    else:
        recorder = ResumeRecorder(
            recording,
            group,
            steps=lambda: steps_taken(prepared.optimizers),
            restored=lambda: counted_steps(prepared.optimizers),
            finish_save=finish_save,
        )
    loaders.watch = recorder.note_batch
    return recorder
