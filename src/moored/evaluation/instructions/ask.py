"""The tasks as prompts of one model: what its chat template makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moored.data import Prompt
from moored.data.encode import Encoder
from moored.data.template import TemplateError
from moored.evaluation.instructions.tasks import TASKS
from moored.utils.errors import UserError

if TYPE_CHECKING:
    from moored.config import Config


def instruction_prompts(config: Config, tokenizer: Any) -> list[Prompt]:
    """The built-in instructions as questions; `sample_id` is the name of a task.

    Raises:
        UserError: the model has no chat template, or one that cannot ask a single question.
    """
    chat = Encoder(tokenizer, config.data).chat
    switch = "or set evaluation.instructions to false"
    if not chat.templates:
        raise UserError(
            f"evaluation.instructions: {config.model.name_or_path} has no chat template, so it "
            f"cannot be asked: give one as data.chat_template, {switch}"
        )
    found: list[Prompt] = []
    try:
        for name, task in TASKS.items():
            asked = {"role": "user", "content": task.prompt}
            turns = [asked, {"role": "assistant", "content": "Yes."}]
            (tokens,) = chat.encode(chat.layouts(turns))
            if isinstance(tokens, str):
                raise TemplateError(tokens)
            stops = chat.ends_of(tokens)
            ids = chat.prompt_ids([asked])
            found.append(Prompt(sample_id=name, input_ids=ids, completion="", stop_token_ids=stops))
    except TemplateError as error:
        raise UserError(f"evaluation.instructions: {error}, {switch}") from error
    return found
