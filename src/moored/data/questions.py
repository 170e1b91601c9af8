"""Everyday questions on no subject in particular, for samples of what a chat model says.

Nothing else lives here. A change makes other samples: raise `drawn.SCHEME` with it.
"""

from __future__ import annotations

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
