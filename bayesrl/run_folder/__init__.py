"""The run folder: one place for the checkpoint, the settings and the saved draws of a fit.

problem.json                    what was fitted: compared before a run is continued
checkpoint.safetensors          state and history, replaced in one step
checkpoint.before.safetensors   the checkpoint before that one, for the case that it is damaged
posterior.nc                    draws and history as a netCDF DataTree, written when a run ends
model.json                      the model and its options, where the command line made the run
scores.json                     the scores of the fit, where the command line made the run

Each bears a stamp (`bayesrl.files.stamps`), so that damage is seen, and files of two runs are told apart.
"""

from bayesrl.files.plain import write_file
from bayesrl.files.stamps import FORMAT
from bayesrl.run_folder.arrays import (
    CHECKPOINT,
    LEARNED,
    POSTERIOR,
    PREVIOUS_CHECKPOINT,
    done_in,
    fits_in,
    history_in,
    load_checkpoint,
    read_arrays,
    read_checkpoint,
    read_draws,
    read_history,
    save_arrays,
    save_checkpoint,
    save_draws,
)
from bayesrl.run_folder.folders import claim, hold_folder, open_folder, release
from bayesrl.run_folder.problems import (
    MODEL,
    MODEL_SCHEMA,
    PROBLEM,
    SCORES,
    check_same,
    is_begun,
    load_json,
    read_problem,
    save_json,
    save_problem,
)

__all__ = [
    "CHECKPOINT",
    "FORMAT",
    "LEARNED",
    "MODEL",
    "MODEL_SCHEMA",
    "POSTERIOR",
    "PREVIOUS_CHECKPOINT",
    "PROBLEM",
    "SCORES",
    "check_same",
    "claim",
    "done_in",
    "fits_in",
    "history_in",
    "hold_folder",
    "is_begun",
    "load_checkpoint",
    "load_json",
    "open_folder",
    "read_arrays",
    "read_checkpoint",
    "read_draws",
    "read_history",
    "read_problem",
    "release",
    "save_arrays",
    "save_checkpoint",
    "save_draws",
    "save_json",
    "save_problem",
    "write_file",
]
