"""The run folder: one place for the checkpoint, the settings and the saved draws of a fit.

problem.json                    the description of the problem, compared before a run continues
checkpoint.safetensors          state and history, replaced in one step
checkpoint.before.safetensors   the previous checkpoint, in case the last one is damaged
posterior.nc                    draws and history as a netCDF DataTree, written when a run ends
model.json                      the model and its options, if the command line made the run
scores.json                     the scores of the fit, if the command line made the run

Each file has a stamp (`bayesrl.files.digests`), which shows damage and tells the files of two runs apart.
"""

# ruff: noqa: I001  (one list for each module)
from bayesrl.files.regular_files import write_file as write_file
from bayesrl.files.digests import FORMAT as FORMAT
from bayesrl.run_folder.arrays import (
    CHECKPOINT as CHECKPOINT,
    LEARNED as LEARNED,
    POSTERIOR as POSTERIOR,
    PREVIOUS_CHECKPOINT as PREVIOUS_CHECKPOINT,
    done_in as done_in,
    fits_in as fits_in,
    history_in as history_in,
    load_checkpoint as load_checkpoint,
    load_memories as load_memories,
    read_arrays as read_arrays,
    read_checkpoint as read_checkpoint,
    read_draws as read_draws,
    read_history as read_history,
    save_arrays as save_arrays,
    save_checkpoint as save_checkpoint,
    save_draws as save_draws,
)
from bayesrl.run_folder.folders import (
    claim as claim,
    hold_folder as hold_folder,
    open_folder as open_folder,
    release as release,
)
from bayesrl.run_folder.json_files import (
    MODEL as MODEL,
    MODEL_SCHEMA as MODEL_SCHEMA,
    PROBLEM as PROBLEM,
    SCORES as SCORES,
    check_same as check_same,
    is_begun as is_begun,
    load_json as load_json,
    option_names as option_names,
    read_problem as read_problem,
    save_json as save_json,
    save_problem as save_problem,
)
