"""Values that may pass in `robustness_fuzz`, with the reason; written independently of the library's own checks."""

import re

REASONS = {
    "default": "the argument's own default",
    "count": "a whole number that is large enough; NumPy's without axes is one",
    "number": "a number in range, whole or real; NumPy's without axes is one, and a tiny one where 0 is in range",
    "flag": "True or False for a flag",
    "key": "another key, of JAX's new or old style",
    "text": "a name or text is any text",
    "path": "a path is any text that is not empty",
    "function": "a function, or a class that is called as one; what it gives is looked at when it is called",
    "numbers": "numbers, or lists and arrays of them, of a shape that fits",
    "container": "an empty list, tuple or dictionary, or one whose parts are of the right kind",
    "settings": "settings as a file of JSON holds them, which other programs may read",
    "later": "an environment's id or maker, and the value of a reward, which are looked at when the program is run",
    "whatever": "parameters of an environment of the user's own, which it alone reads; nan is refused",
    "own": "one of the several kinds that the argument takes",
}

_WHOLE = {"1", "array of 3, no axes"}
_REAL = {"1", "2**40", "0.5", "2.5", "array of 3, no axes"}
_FROM_ZERO = {*_REAL, "0", "1e-320"}
_ANY_REAL = {*_FROM_ZERO, "-1", "-0.5"}
_SHARE = {"0", "1", "0.5", "1e-320"}
_TEXT = {"'3'", "''", "'abc'", "'a\\0b'"}

_KINDS: list[tuple[str, str, set[str]]] = [
    (r"control\.JaxEnvironment\.params", "whatever", {"*"}),
    (r"Prompts\.take\.chosen|control\.Duels\.oracle", "numbers", {"old key", "words of a key"}),
    (r"bayesrl\.reward\.value", "later", {*_ANY_REAL, "nan", "inf", "-inf", "1e308", "True", "False"}),
    (r"bayesrl\.environment\.distribution", "own", {"distribution"}),
    (r"control\.episode_sections\.environment|bayesrl\.LearningProblem\.environment", "later",
     {*_TEXT, "function", "class"}),
    (r"bayesrl\.Calibration\.(pit|ranks)", "numbers",
     {"array of 3, no axes", "array [3]", "array [0.5]", "array []", "array of 2 × 2 × 2", "old key",
      "words of a key"}),
    (r"bayesrl\.Calibration\.names", "container", {"()"}),
    (r"PreferenceData\.of_\w+\.annotator", "container", {"[1]", "['a']", "[None]", "array [3]", "array [0.5]"}),
    (r"PreferenceData\.of_\w+\.(item|first|second|rating|label)", "numbers", {"[1]", "array [3]", "array [0.5]"}),
    (r"PreferenceData\.of_pairs\.(outcome|shown)", "own", {"0", "1", "0.5", "[1]", "array [0.5]", "True", "False"}),
    (r"rewards\.uncertain\.reference", "numbers", {"0", "1", "old key"}),
    (r"lm\.policy\.top_k", "count", {"0"}),
    (r"objectives\.BestOfN\.n", "count", _WHOLE),
    (r"bayesrl\.best_of\.n", "count", {*_WHOLE, "[1]", "array [3]"}),
    (r"bayesrl\.power\.alpha", "number", {"2**40", "0.5", "2.5", "array of 3, no axes"}),
    (r"control\.river_swim\.num_states|control\.deep_sea\.size|bandits\.\w+\.num_arms"
     r"|objectives\.ForwardKL\.num_particles|bayesrl\.ReuseDraws\.num_particles|bayesrl\.importance\.num_samples"
     r"|Posterior\.estimate\.num_samples|lm\.estimate_kl\.num_samples"
     r"|lm\.(language_modeling|train_small_lm)\.length", "count",
     {"array of 3, no axes"}),
    (r".*\.(max_failures|max_count|num_workers|time|rank|seed|depth|window|head_dim|experts|chosen|label|eos|pad|bos"
     r"|observation|restart|end|action)|Posterior\.(sample|totals)\.num_samples|WeightedDraws\.resample\.num_samples",
     "count", {*_WHOLE, "0", "()"}),
    (r".*\.(max_shard_bytes|max_bytes)", "count", {*_WHOLE, "2**40"}),
    (r".*\.(num_\w+|hidden|horizon|frames|max_table|max_proposals|batch|batch_size|update_every|width|length|heads"
     r"|kv_heads|inner|vocab_size|max_length|max_new_tokens|top_k|token_types|window)", "count", _WHOLE),
    (r"bandits\.\w+\.prior_[ab]", "number", {"1", "2**40", "2.5", "array of 3, no axes"}),
    (r"\w+\.\w+\.(discount|slip|share|epsilon|trace|prior_fraction|top_p)|LearnResult\.\w+\.share", "number",
     {*_SHARE, "2.5", "2**40", "array of 3, no axes"}),
    (r".*BanditRuns\.band\.level|lm\.(policy|CausalLMDistribution)\.min_p", "number", _SHARE),
    (r".*\.(level|confidence)", "number", {"0.5", "1"}),
    (r".*\.(gravity|initializer_range|query_scale|score_cap|logit_cap|epsilon|tolerance)", "number", _FROM_ZERO),
    (r".*\.(force|\w+_reward|reward_bound|on_error|prior_mean|turning_point)", "number",
     {*_ANY_REAL, "array [3]", "array [0.5]", "[1]"}),
    (r".*\.(beta|start_beta)", "number", {*_FROM_ZERO, "array [3]", "array [0.5]", "[1]", "array of 2 × 2 × 2"}),
    (r".*\.(tolerance|learning_rate|log_z_rate|noise|scale|prior_scale|reward_scale|temperature|clip"
     r"|time_limit|seconds|mass|length|a|b|sds|\w+_mass|half_length)", "number", _REAL),
    (r".*\.(progress|flag|observable|full|strip|ignore_case|batched|with_prompt|end|tied|parallel|critic|stationary"
     r"|unbounded|within_prior|starts_at_prior|paid_at_end|\w+_bias|query_key_norm|ends_known|skip_special"
     r"|continues|special|recurrent|merge|mean|quasi)", "flag", {"True", "False"}),
    (r"control\.GymnasiumSource\.action_masks|control\.learn\.action_masks", "flag", {"False"}),
    (r"GPT2\.init\.key", "key", {"key", "old key", "words of a key"}),
    (r".*\.key", "key", {"key", "old key"}),
    (r".*\.(directory|folder|path)", "path", {"'3'", "'abc'"}),
    (r"bayesrl\.(load|resume)\.source", "function", {"function", "class"}),
    (r".*\.(name|about|field|answer|text|pattern|gold|revision|model_type|problem|activation)", "text", _TEXT),
    (r".*\.(policy|program|model|fn|callback|features|prior|behaviour|optimum|infer|train|source|reward|guide"
     r"|exploration|environment)", "function", {"function", "class"}),
    (r".*\.(successors|probabilities|rewards|start|terminal|prior|observation|held|propensity|reward|concentration"
     r"|reward_mean|values|low|high|optimum|prompt|real|within|tokens|sites|truth|kl|proxy|gold|probs)", "numbers",
     {*_ANY_REAL, "[1]", "[]", "()", "array [3]", "array [0.5]", "array []", "array of 2 × 2 × 2", "old key",
      "words of a key"}),
    (r"control\.JaxEnvironment\.actions", "own", {"distribution"}),
    (r"control\.ActorCritic\.clip|lm\.Pretrained\.tokenizer|GPT2\.init\.dtype", "own", {"None"}),
    (r".*\.(keep|config|generation|adapter|special_map|made_of)", "settings", {"{}", "{'a': 1}"}),
    (r".*\.(metrics|diagnoses|frontiers|options|fit_options|learn_options|engines|overoptimisation)", "container",
     {"{}"}),
    (r".*\.(texts|prompts|room_for|labels|names|action_names)", "container",
     {"[]", "()", "['a']", "array []", "array of texts"}),
    (r".*\.(args|held_out|sections|parts|rows|windowed|unturned|enumerated|chosen)", "container",
     {"[]", "()", "[1]", "array []"}),
]  # fmt: skip
"""Names of arguments, the reason, and the values that are right for them; the first entry with the value counts."""


def reason(name: str, param: str, value: str, default: str | None = None) -> str | None:
    """Find the key of the reason why a value may replace an argument, or None if it may not."""
    if value == default:
        return "default"
    for pattern, kind, right in _KINDS:
        if (value in right or "*" in right) and re.fullmatch(pattern, f"{name}.{param}"):
            return kind
    return None
