"""The prompts: everyday requests, each with constraints that `checks.py` can decide.

Short answers meet all of them, so that a small model on a CPU has a fair chance. A change here
makes figures incomparable with earlier ones: it belongs into the changelog, under Numerics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moored.data import Prompt
from moored.data.samples import Encoder
from moored.data.template import TemplateError
from moored.evaluation.instructions.checks import (
    Check,
    avoids,
    begins_with,
    bold,
    bullets,
    capital_words,
    contains,
    contains_exactly,
    ends_with,
    heading,
    json_list,
    json_object,
    lines,
    lowercase,
    no_digits,
    numbered,
    one_of,
    only_bullets,
    paragraphs,
    placeholders,
    quoted,
    sections,
    table,
    uppercase,
    without,
    words_at_least,
    words_at_most,
)
from moored.utils.errors import UserError

if TYPE_CHECKING:
    from moored.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One prompt.

    Attributes:
        name: unique.
        prompt: what the user says.
        checks: all that it asks for and that can be decided.
    """

    name: str
    prompt: str
    checks: tuple[Check, ...]


def _tasks(*given: tuple[str, str, tuple[Check, ...]]) -> dict[str, Task]:
    return {name: Task(name=name, prompt=text, checks=checks) for name, text, checks in given}


TASKS = _tasks(
    (
        "harbour",
        "Describe a harbour at dawn in two or three sentences. Use small letters only, no capitals "
        "anywhere.",
        (lowercase(),),
    ),
    (
        "frogs",
        "Tell me one fact about frogs. Your whole answer must be in lowercase, names and sentence "
        "beginnings included.",
        (lowercase(),),
    ),
    (
        "rain-email",
        "Write a very short note to a colleague that the picnic is off because of rain. Only small "
        "letters, and at most 30 words.",
        (lowercase(), words_at_most(30)),
    ),
    ("door-sign", "Write a sign for a door that sticks. ALL CAPITALS, please.", (uppercase(),)),
    (
        "slogan",
        "Invent a slogan for a bicycle repair shop. Write it in capital letters only, with at most "
        "eight words.",
        (uppercase(), words_at_most(8)),
    ),
    (
        "stew",
        "Name three things that go into a vegetable stew, in one sentence without any comma.",
        (without(","),),
    ),
    (
        "desk",
        "Explain in two sentences how to tidy a desk. Do not use a single comma.",
        (without(","),),
    ),
    (
        "letter-z",
        "Say something friendly about zebras without using exclamation marks.",
        (without("!"),),
    ),
    (
        "no-question",
        "Suggest a topic for a conversation at dinner. There must be no question mark in your "
        "answer.",
        (without("?"),),
    ),
    (
        "marathon",
        "How long is a marathon? Answer in words; no digit may occur.",
        (no_digits(),),
    ),
    (
        "week",
        "How many days and hours does a week have? Write all numbers out as words, without digits, "
        "in one sentence of at most 20 words.",
        (no_digits(), words_at_most(20)),
    ),
    (
        "three-bullets",
        "Give reasons to go for a walk: exactly three bullet points, each on a line that begins "
        "with '* '.",
        (bullets(3),),
    ),
    (
        "five-bullets",
        "What do I need to bake bread? Answer with exactly five bullet points (lines that begin "
        "with '- ') and nothing else.",
        (bullets(5), only_bullets()),
    ),
    (
        "two-bullets",
        "Compare tea and coffee in exactly two bullet points that begin with '- '. Keep the whole "
        "answer under 50 words.",
        (bullets(2), words_at_most(49)),
    ),
    (
        "four-steps",
        "How do I plant a tree? Give four numbered steps, 1. to 4., one a line.",
        (numbered(4),),
    ),
    (
        "three-steps",
        "Explain how to send a parcel in exactly three numbered lines (1., 2., 3.). Do not use the "
        "word 'package'.",
        (numbered(3), avoids("package")),
    ),
    (
        "lighthouse",
        "Tell me about lighthouses in at least 60 words.",
        (words_at_least(60),),
    ),
    (
        "river",
        "Describe a river from its source to the sea. Use 50 words or more, and no bullet points.",
        (words_at_least(50), bullets(0)),
    ),
    ("gravity", "What is gravity? Use 15 words at most.", (words_at_most(15),)),
    (
        "moon",
        "Why does the moon change its shape? Answer in no more than 25 words.",
        (words_at_most(25),),
    ),
    (
        "between",
        "Describe your favourite season in 20 to 40 words.",
        (words_at_least(20), words_at_most(40)),
    ),
    (
        "lantern",
        "Write three sentences about a night in the woods. The word 'lantern' must occur at least "
        "twice.",
        (contains("lantern", 2),),
    ),
    (
        "copper-wind",
        "Write a short paragraph that contains the words 'copper', 'wind' and 'seven'.",
        (contains("copper"), contains("wind"), contains("seven")),
    ),
    (
        "once-only",
        "Write two sentences about gardens. Use the word 'green' exactly once.",
        (contains_exactly("green", 1),),
    ),
    (
        "no-good",
        "Recommend a way to spend a free afternoon. Avoid the words 'good' and 'great'.",
        (avoids("good", "great"),),
    ),
    (
        "no-the",
        "Describe a cat that sleeps on a chair, in one sentence without the word 'the'.",
        (avoids("the"),),
    ),
    (
        "snow",
        "Explain snow to a child who has never seen it. Do not use the words 'cold', 'white' or "
        "'ice'.",
        (avoids("cold", "white", "ice"),),
    ),
    (
        "that-is-all",
        "Give me one tip for sleeping well. End with exactly this sentence: That is all for now.",
        (ends_with("That is all for now."),),
    ),
    (
        "ask-again",
        "Name a bird that cannot fly. Your answer must end with the words 'Ask me again' and "
        "nothing after them, not even a full stop.",
        (ends_with("Ask me again"),),
    ),
    (
        "dear-reader",
        "Tell me in two sentences why books have page numbers. Begin with the words 'Dear reader'.",
        (begins_with("Dear reader"),),
    ),
    (
        "short-answer",
        "What is a compass good for? Begin your reply with 'In short:' and use at most 30 words.",
        (begins_with("In short:"), words_at_most(30)),
    ),
    (
        "frame",
        "Recommend a hobby in one sentence. Begin with 'Well,' and end with 'Enjoy!'.",
        (begins_with("Well,"), ends_with("Enjoy!")),
    ),
    (
        "quotes",
        "Write a motto for a public library. Put your whole answer in double quotation marks.",
        (quoted(),),
    ),
    (
        "quoted-lower",
        "Complete the saying 'better late than ...'. Reply with the whole saying, in double quotes "
        "and in small letters.",
        (quoted(), lowercase()),
    ),
    (
        "json-person",
        "Invent a person. Reply with a JSON object and nothing else; its keys are name, age and "
        "city.",
        (json_object("name", "age", "city"),),
    ),
    (
        "json-book",
        "Describe an invented book as a JSON object with exactly the keys title, author and year. "
        "No other text.",
        (json_object("title", "author", "year"),),
    ),
    (
        "json-colours",
        "Reply with a JSON array of exactly four colours as strings, and nothing around it.",
        (json_list(4),),
    ),
    (
        "two-poems",
        "Write two different one-line poems about apples. Separate them by a line that holds only "
        "three asterisks: ***",
        (sections(2),),
    ),
    (
        "pro-contra",
        "Should shops be open on Sundays? Give one sentence for it and one against it, parted by a "
        "line with nothing but ***. At most 60 words in all.",
        (sections(2), words_at_most(60)),
    ),
    (
        "three-parts",
        "Tell a tiny story in three parts: beginning, middle and end. Between the parts put a line "
        "that holds only ***",
        (sections(3),),
    ),
    (
        "two-paragraphs",
        "Write exactly two short paragraphs about mountains, with an empty line between them.",
        (paragraphs(2),),
    ),
    (
        "three-lines",
        "Write a poem about fog. It has exactly three lines, and no comma.",
        (lines(3), without(",")),
    ),
    (
        "four-lines",
        "List four rivers, one a line, four lines in all. No numbers and no bullet points.",
        (lines(4), bullets(0), no_digits()),
    ),
    (
        "heading",
        "Explain in one sentence what a calendar is. Put a Markdown heading (a line that begins "
        "with '# ') before it.",
        (heading(),),
    ),
    (
        "bold",
        "Name two rules for swimming in a lake. Mark at least two words or phrases in bold, "
        "**like this**.",
        (bold(2),),
    ),
    (
        "template",
        "Write a template for a two-sentence invitation. Use at least three placeholders in square "
        "brackets, such as [name].",
        (placeholders(3),),
    ),
    (
        "table",
        "Show three fruits and their colours as a Markdown table with two columns. Only the table.",
        (table(2),),
    ),
    (
        "shout",
        "Warn someone of wet paint in one sentence in which at least two words are in capital "
        "letters.",
        (capital_words(2),),
    ),
    (
        "yes-no",
        "Is the sun larger than the earth? Answer with one of these and nothing else: Yes. / No. / "
        "I cannot tell.",
        (one_of("Yes.", "No.", "I cannot tell."),),
    ),
    (
        "one-word",
        "Which of these is an animal: stone, otter, spoon? Reply with that one word in small "
        "letters and nothing else.",
        (one_of("stone", "otter", "spoon"),),
    ),
)


# ---------------------------------------------------------------- as prompts of one model


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
        stops = chat.answer_ends()
        for name, task in TASKS.items():
            ids = chat.prompt_ids([{"role": "user", "content": task.prompt}])
            found.append(Prompt(sample_id=name, input_ids=ids, completion="", stop_token_ids=stops))
    except TemplateError as error:
        raise UserError(f"evaluation.instructions: {error}, {switch}") from error
    return found
