"""Which deviations from a run's rules are tolerated; none of them, unless an adapter to another library asks for it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STRICT", "Leniency"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leniency:
    """What is tolerated instead of refused. By default everything is refused.

    Attributes:
        foreign_parameters: An optimizer may update parameters of models that were not prepared.
        unassigned_parameters: Trainable parameters of a prepared model may be in no optimizer.
        unread_settings: The script may pass settings that the strategy does not read.
        clip_inside_window: Gradients may be clipped before the accumulation window ends: what is there so far.
        save_open_gradients: A training state may be saved between a backward pass and its optimizer step.
        script_wins: What the script passes replaces a different value of the file, a flag or a variable.
    """

    foreign_parameters: bool = False
    unassigned_parameters: bool = False
    unread_settings: bool = False
    clip_inside_window: bool = False
    save_open_gradients: bool = False
    script_wins: bool = False


STRICT = Leniency()
"""Everything is refused."""
