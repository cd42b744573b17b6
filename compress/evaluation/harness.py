"""Artifacts as a model of EleutherAI's lm-evaluation-harness, through the runtime of the target (Gao et al. 2024).

``python -m compress.evaluation.harness run --model compress --model_args path=ARTIFACT --tasks NAME`` is the
harness's own command line with this model. Importing this module registers the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.evaluation.evaluate import logits_reader
from compress.evaluation.generate import end_tokens
from compress.formats.generation.decoder import open_decoder, written_tokens
from compress.formats.runtime import get_runtime
from compress.formats.targets import find_target
from compress.models.chat_template import apply_chat_template
from compress.models.json_file import read_json
from compress.models.processor import load_tokenizer
from compress.numerics.token_metrics import negative_log_likelihood
from compress.utils.errors import InputError, MissingExtraError
from compress.utils.progress import Progress, SilentProgress

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
    raise MissingExtraError("lm_eval", "lm-eval", "A model of the lm-evaluation-harness") from error

_LONGEST = 2048
"""Number of tokens read at once if the model's config doesn't state how many it can read."""


@register_model("compress")
class CompressLM(TemplateLM):  # type: ignore[misc]  # the harness has no types that are read here
    """Artifact in any format whose runtime returns logits."""

    def __init__(
        self,
        path: str,
        target: str = "cpu",
        threads: int = 2,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **harness: object,
    ) -> None:
        """Open a model. Raises the errors of opening it.

        Args:
            path: Model folder or file.
            target: Name of the target that runs it.
            threads: Number of threads.
            max_length: Largest number of tokens read at once. Default: the model's positions.
            max_gen_toks: Largest number of generated tokens.
            **harness: Further settings of the harness, which are ignored.
        """
        super().__init__()
        folder, name = Path(path), str(path)
        self.tokenizer = load_tokenizer(folder)
        session = get_runtime(find_target(target).runtime).open(folder, find_target(target), int(threads))
        self._read, self._writer = logits_reader(session, name), open_decoder(session, name)
        self._path, self._ends = name, {self.eot_token_id, *end_tokens(folder)}
        config = read_json(folder / "config.json")
        self.max_length = int(max_length or config.get("max_position_embeddings") or _LONGEST)
        self.max_gen_toks = int(max_gen_toks)
        self.progress: Progress = SilentProgress()

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Return the token that precedes a text without context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Return the name under which the harness caches requests."""
        return self._path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Return tokens of a text.

        Special tokens are added as the tokenizer does, unless the text begins with them or the caller decides.
        """
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **options)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return messages in the model's template. Without a generation prompt, the last message is continued."""
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return apply_chat_template(self.tokenizer, chat_history, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        """Return log p of each continuation after its context, and whether its tokens are the likeliest."""
        results = []
        for text, context, continuation in self.progress.track(requests, "score texts", len(requests)):
            ids = np.array([*context, *continuation][-self.max_length - 1 :], dtype=np.int64)
            target_ids = ids[-len(continuation) :]
            if len(target_ids) == len(ids):
                raise InputError(
                    f"A text of {len(target_ids)} tokens leaves no room for context in {self.max_length} tokens.",
                    hint="give a larger max_length in --model_args, if the model can read so much",
                )
            logits = self._read(ids[:-1])[-len(target_ids) :]
            is_greedy = bool((logits.argmax(axis=-1) == target_ids).all())
            results.append((-float(negative_log_likelihood(logits, target_ids).sum()), is_greedy))
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, results[-1])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log p of each whole text, split into sequences that share one token."""
        results = []
        for request in requests:
            (text,) = request.args
            sequences = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            parts = [(None, *utils.make_disjoint_window(sequence)) for sequence in sequences]
            results.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy text after each context, up to its stop strings. Raises `InputError` for sampling."""
        texts = []
        for request in self.progress.track(requests, "write texts", len(requests)):
            context, arguments = request.args
            options = normalize_gen_kwargs(arguments, self.max_gen_toks)
            if options.get("do_sample") or options.get("temperature"):
                raise InputError("Only greedy generation is supported.", expected="do_sample=False")
            stops = [stop for stop in options["until"] if stop]
            tokens = int(options["max_gen_toks"])
            max_context = self.max_length - tokens
            if max_context < 1:
                raise InputError(f"{tokens} generated tokens leave no room for context in {self.max_length} tokens.")
            generated: list[int] = []
            text = ""
            for token in written_tokens(self._writer, self.tok_encode(context)[-max_context:], tokens, self._ends):
                if token in self._ends:
                    break
                generated.append(token)
                text = str(self.tokenizer.decode(generated, skip_special_tokens=True))
                if any(stop in text for stop in stops):
                    break
            texts.append(min((text.split(stop)[0] for stop in stops), key=len, default=text))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts


def main() -> None:
    """Run the harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    from compress.formats.quiet_output import quiet_libraries

    quiet_libraries()
    cli_evaluate()


if __name__ == "__main__":
    main()
