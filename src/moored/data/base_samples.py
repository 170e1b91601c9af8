"""Texts that the base itself wrote, as tokens: where they are kept, and read as samples.

What draws them loads the base, and is `base_generation.py`. They stand in for the data that the
base was trained on, which nobody has: for x drawn from the base, the mean of log p(x) - log q(x), q
the policy, is the KL from base to policy over whole texts, by definition; so the drift measured on
them is how far the policy left its base where the base itself goes. (Samples of the model in place
of its data: LLM-QAT, arXiv 2305.17888.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moored.config.regularizer import Anchors
from moored.data.token_arrays import Sample
from moored.utils import atomic_dir
from moored.utils.environment import cache_folder
from moored.utils.errors import UserError

if TYPE_CHECKING:
    from moored.config import Corpus, ModelConfig

FILE = "samples.jsonl"
SCHEME = 1  # raised when the same key would be drawn otherwise, as with other questions
SEED, ANCHOR_SEED = 0, 1
# What a chat model is asked: everyday questions on no subject in particular.
QUESTIONS = """\
Why is the sky blue during the day and red at sunset?
How do I cook rice so that it does not stick to the pot?
What is the difference between a lake and a pond?
Give me three tips for falling asleep faster.
Describe how a bicycle stays upright while it is moving.
What should I pack for a weekend of hiking in the mountains?
Explain what inflation means to someone who is ten years old.
Write a short poem about the sea in winter.
How does a refrigerator keep food cold?
What makes a good paragraph in an essay?
What is the difference between butter and margarine?
Suggest a simple dinner with lentils and carrots.
How did people tell the time before there were clocks?
What is photosynthesis and why does it matter?
Give some advice to a person who starts a new job on Monday.
How can I learn to touch type quickly?
Tell me about the history of bread.
What does a librarian do all day?
Why do cats purr?
Explain the water cycle in a few sentences.
How can I keep a house cool in summer?
What are the main differences between jazz and classical music?
Write a polite letter asking a neighbour to keep the noise down.
How do I fold a shirt neatly?
What is a good way to remember people's names?
Describe a market square on a busy Saturday morning.
Why is it important to drink enough water?
How do bees make honey?
What is the purpose of a comma?
Explain the difference between weather and climate.
How would you plan a birthday party for a shy child?
What can I do with old newspapers?
Why do ships made of steel float?
Summarise the story of the tortoise and the hare.
What are some hobbies that need little money?
How does the moon cause the tides?
Give me ideas for a vegetable garden on a balcony.
What is the role of a goalkeeper in football?
How do I write a good introduction for a talk?
Explain how a candle burns.
What are the advantages of living in a small village?
What is a library card good for?
How can I take better photographs with a simple camera?
What is a metaphor? Give an example.
Describe the taste of an orange to someone who never had one.
How do mountains form?
What should I consider before I adopt a dog?
Why is sleep important for learning?
""".splitlines()
# What it is asked for anchors: none of these, so that what is measured is not what was held.
ANCHOR_QUESTIONS = """\
How do glaciers shape a valley?
Recommend a way to organise a small kitchen.
What happens when two black holes meet?
Write a limerick about a lazy dog.
How is cheese made?
Compare trains and planes for a journey of five hours.
What is a prime number, and why do people care?
Help me word a short apology for a late reply.
Which exercises can I do at a desk?
Describe a thunderstorm to someone who has never seen one.
How does a vaccine train the body?
What are some rules for a fair debate?
Explain recursion with an example from daily life.
How do I repair a flat bicycle tyre?
List things to check before signing a lease.
What made the printing press so important?
Tell a story of three sentences about a lost key.
How can a beginner start to run?
What is the difference between a virus and a bacterium?
Why do leaves change their colour in autumn?
Translate "good morning, how are you" into three languages.
What does an interest rate do to a mortgage?
Sketch a plan for a week of simple meals.
How do submarines dive and come up again?
""".splitlines()


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseIdentity:
    """Whose texts they are.

    Attributes:
        model: of the recipe: quantisation and precision.
        revision: of the files, as `resolve_model` says.
    """

    model: ModelConfig
    revision: str

    def facts(self, corpus: Corpus) -> dict[str, Any]:
        """All that the texts depend on, as JSON values."""
        nf4 = self.model.quantization == "nf4"
        anchors = {"use": "anchors"} if isinstance(corpus, Anchors) else {}
        return anchors | {
            "scheme": SCHEME,
            "seed": seed_of(corpus),
            "revision": self.revision,
            "quantization": self.model.quantization,
            "double_quantization": self.model.double_quantization if nf4 else None,
            "dtype": self.model.dtype,
            "max_tokens": corpus.max_tokens,
            "window_tokens": corpus.window_tokens,
        }


def seed_of(corpus: Corpus) -> int:
    """The seed of its texts: what is trained on must not be what is measured."""
    return ANCHOR_SEED if isinstance(corpus, Anchors) else SEED


def drawn_folder(corpus: Corpus, base: BaseIdentity) -> Path:
    """Where the texts of this base and these lengths are, or will be."""
    facts = json.dumps(base.facts(corpus), sort_keys=True)
    return cache_folder() / "base-samples" / hashlib.sha256(facts.encode()).hexdigest()[:24]


def drawn_samples(name: str, corpus: Corpus, base: BaseIdentity, *, label: str) -> list[Sample]:
    """The texts as samples: a prompt (or start token), and what the base wrote, which is scored.

    Raises:
        UserError: they were not drawn yet.
    """
    folder = drawn_folder(corpus, base)
    if (fault := atomic_dir.verify(folder)) is not None:
        why = f"{folder} is broken ({fault})" if folder.exists() else "they are not drawn yet"
        raise UserError(
            f"{label}.builtin=base-samples: {why}: run `moored prepare` with this recipe once, "
            "where the base fits one device"
        )
    samples: list[Sample] = []
    for number, line in enumerate((folder / FILE).read_text().splitlines(), 1):
        row = json.loads(line)
        ids = np.array(row["prompt"] + row["text"], dtype=np.int32)
        mask = np.arange(len(ids)) >= len(row["prompt"])
        samples.append(Sample(sample_id=f"{name}:{number}", input_ids=ids, label_mask=mask))
    return samples


def write_drawn(folder: Path, rows: Iterable[tuple[list[int], list[int]]]) -> None:
    """Prompt and text of each row, as token ids."""
    with open(folder / FILE, "w", encoding="utf-8") as file:
        for prompt, text in rows:
            file.write(json.dumps({"prompt": prompt, "text": text}) + "\n")
