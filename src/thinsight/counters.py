"""What servers of reduced models count, by the names that Prometheus sees: in vLLM and in our own server alike."""

from __future__ import annotations

SEEN = "thinsight:vision_tokens_seen"
KEPT = "thinsight:vision_tokens_kept"
REDUCED = "thinsight:prompts_reduced"
WHOLE = "thinsight:prompts_whole"
HELP = {
    SEEN: "Vision tokens of prompts that were read, reduced or not.",
    KEPT: "Of these, vision tokens that entered the layers of a stage.",
    REDUCED: "Prompts with vision tokens that were reduced.",
    WHOLE: "Prompts with vision tokens that were kept whole, by reason.",
}
