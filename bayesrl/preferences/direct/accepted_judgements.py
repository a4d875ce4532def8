"""The model that judgements stand for, as a loss takes them."""

import hashlib
from dataclasses import replace

import numpy as np

from bayesrl.errors import PreferenceError
from bayesrl.preferences.comparison_models import bradley_terry, gaussian_ratings, plackett_luce
from bayesrl.preferences.direct.judgement_losses import DirectLoss
from bayesrl.preferences.preference_program import PreferenceModel
from bayesrl.preferences.records.preference_data import PreferenceData
from bayesrl.preferences.score_models import FreeScores


def model_of_judgements(judgements: PreferenceModel | PreferenceData, loss: DirectLoss) -> PreferenceModel:
    """Return the model of the judgements; for KTO, pairs become labels."""
    data = judgements.data if isinstance(judgements, PreferenceModel) else judgements
    if loss in ("ipo", "kto"):
        if isinstance(judgements, PreferenceModel) and set(judgements.priors) - {judgements.score_model.site}:
            raise PreferenceError(
                f"loss={loss!r} is no likelihood, and the model has effects beside scores "
                f"({', '.join(name for name in judgements.priors if name != judgements.score_model.site)}); pass the "
                "data alone, or loss='likelihood'"
            )
        if data.kind != "pairs" and not (loss == "kto" and data.kind == "labels"):
            wanted = "pairs" if loss == "ipo" else "labels, or pairs whose chosen items are good"
            raise PreferenceError(f"loss={loss!r} got {data.kind}; pass {wanted}")
        if loss == "kto" and data.kind == "pairs":
            data = _as_labels(data)
        # Where it comes to likelihoods, ties need a model; IPO has a target for them.
        return PreferenceModel(data, FreeScores(data.items, 1.0), "bradley_terry", None)
    if isinstance(judgements, PreferenceModel):
        if not isinstance(judgements.score_model, FreeScores):
            raise PreferenceError(
                "the policy itself gives the scores, and the model has features=; leave them out of the model"
            )
        return judgements
    made: PreferenceModel
    if data.kind == "ratings":
        made = gaussian_ratings(data)
    else:
        made = plackett_luce(data) if data.kind == "rankings" else bradley_terry(data)
    return made


def _as_labels(data: PreferenceData) -> PreferenceData:
    """Call the winner of each pair good, and the loser bad."""
    if data.num_ties:
        raise PreferenceError(f"loss='kto' got {data.num_ties} ties, of which neither item is good; leave them out")
    labels = (data.ranks == 0).astype(int).reshape(-1)
    members = data.members.reshape(-1, 1)
    annotator = None if data.annotator is None else np.repeat(data.annotator, 2)
    return replace(
        data, kind="labels", members=members, ranks=np.zeros_like(members), labels=labels, annotator=annotator
    )


def fingerprint_of(model: PreferenceModel) -> str:
    """Return a short fingerprint of data and model, for run folders."""
    data = model.data
    fingerprint = hashlib.sha256(
        repr((model.name, model.ties, model.position, model.noise, data.kind, data.items)).encode()
    )
    for array in (data.members, data.ranks, data.labels, data.ratings, data.annotator, model.lengths):
        fingerprint.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return fingerprint.hexdigest()[:16]
