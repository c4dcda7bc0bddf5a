"""Captions: write a sentence from attributes, and read the attributes back out of one.

The writer works on (kind, attributes) alone. The reader needs no template: it binds each colour to
the noun beside it, so it also reads free rewordings made of the same words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .vocabulary import (
    ATTRIBUTES,
    COLOURS,
    KIND_WORDS,
    PITCH_WORDS,
    SKINS,
    SPEECH_VERBS,
    SYLLABLES,
    TEMPO_ADJECTIVES,
    TEMPO_ADVERBS,
)

OMIT_PROBABILITY = 0.15

_COLOURED_NOUNS = ("hair", "shirt", "background", "ball", "bell", "drum")
_PITCH_OF = {word: value for value, words in PITCH_WORDS.items() for word in words}
_TEMPO_OF = {
    word: value
    for table in (TEMPO_ADJECTIVES, TEMPO_ADVERBS)
    for value, words in table.items()
    for word in words
}
_BREAKS = frozenset("the a an on with and in".split())
_HIT_VERBS = {
    "ball": ("bounces", "is bouncing"),
    "bell": ("swings", "rings", "is ringing", "swings and rings", "is swinging"),
    "drum": ("beats", "is beating"),
}


def words(caption: str) -> list[str]:
    """Split a caption into lower-case words; punctuation carries no meaning here."""
    return re.findall(r"[a-z]+", caption.lower())


# --------------------------------------------------------------------------------------- reading


def parse(caption: str) -> dict[str, str]:
    """Read the kind and the attributes that a caption names.

    Returns a dict with `kind` (absent when nothing in the text tells it) and only the attributes
    mentioned, with canonical values ("deep" reads as "low"). Unknown words are ignored.
    """
    clauses = [words(clause) for clause in re.split(r"[,.;:!?]", caption)]
    tokens = [token for clause in clauses for token in clause]
    clause_of = [number for number, clause in enumerate(clauses) for _ in clause]
    found: dict[str, str] = {}
    kind = _read_kind(tokens)
    spoken = _read_syllables(tokens)
    if kind is None and len(spoken) > 1:
        kind = "speech"
    if kind is not None:
        found["kind"] = kind
    keys = ATTRIBUTES.get(kind or "", ("background", "tempo"))
    if "syllables" in keys and spoken:
        found["syllables"] = " ".join(spoken)
    for index, token in enumerate(tokens):
        if token in COLOURS:
            noun = _noun_beside(tokens, clause_of, index)
            if noun is not None and noun in keys:
                found.setdefault(noun, token)
        elif token in SKINS and "skin" in keys:
            found.setdefault("skin", token)
        elif token in _PITCH_OF:
            following = tokens[index + 1] if index + 1 < len(tokens) else ""
            if following == "pace":  # "at a medium pace" speaks of tempo
                found.setdefault("tempo", {"middle": "steady"}.get(_PITCH_OF[token], "fast"))
                continue
            key = "voice" if kind == "speech" else "pitch"
            if key in keys:
                found.setdefault(key, _PITCH_OF[token])
        elif token in _TEMPO_OF:
            found.setdefault("tempo", _TEMPO_OF[token])
    return found


def _read_kind(tokens: Sequence[str]) -> str | None:
    """The kind whose words come up most; a thing named outright wins over its verbs."""
    score = {
        kind: sum(token in names for token in tokens) + 10 * (kind in tokens)
        for kind, names in KIND_WORDS.items()
    }
    best = max(score, key=lambda kind: score[kind])
    return best if score[best] > 0 else None


def _read_syllables(tokens: Sequence[str]) -> list[str]:
    """The first run of syllables after a verb of speech, else the longest run anywhere."""
    runs: list[tuple[int, list[str]]] = []
    for index, token in enumerate(tokens):
        if token not in SYLLABLES:
            continue
        if runs and runs[-1][0] + len(runs[-1][1]) == index:
            runs[-1][1].append(token)
        else:
            runs.append((index, [token]))
    verbs = [index for index, token in enumerate(tokens) if token in SPEECH_VERBS]
    after = [run for begin, run in runs if verbs and begin > verbs[0]]
    if after:
        return after[0]
    return max((run for _, run in runs), key=len, default=[])


def _noun_beside(tokens: Sequence[str], clause_of: Sequence[int], index: int) -> str | None:
    """The noun a colour at `index` belongs to.

    The next one if it follows closely, else the last one before; in the colour's own clause first
    ("hair red, shirt green"), then across commas ("a red, bouncing ball").
    """
    for across in (False, True):
        near = [across or clause == clause_of[index] for clause in clause_of]
        for j in range(index + 1, min(index + 3, len(tokens))):
            if not near[j] or tokens[j] in COLOURS or tokens[j] in SKINS or tokens[j] in _BREAKS:
                break
            if tokens[j] in _COLOURED_NOUNS:
                return tokens[j]
        for j in range(index - 1, max(index - 5, -1), -1):
            if near[j] and tokens[j] in _COLOURED_NOUNS:
                return tokens[j]
    return None


# --------------------------------------------------------------------------------------- writing


def write(
    kind: str, attributes: Mapping[str, str], person: str, rng: np.random.Generator | None = None
) -> str:
    """Write one caption.

    Args:
        kind: one of `KINDS`.
        attributes: the values of `ATTRIBUTES[kind]`; speech without syllables is just speech.
        person: "girl" or "boy", as the face is drawn; used by speech alone.
        rng: draws the template, the order of phrases, synonyms and omissions (each attribute is
            left out with probability 0.15). None gives the canonical caption, which names all.
    """
    if rng is None:
        return _canonical(kind, attributes, person)
    keys = [key for key in ATTRIBUTES[kind] if rng.random() >= OMIT_PROBABILITY]
    said = {key: attributes[key] for key in keys if key in attributes}
    writer = _Writer(kind, said, person, rng)
    templates = _SPEECH_TEMPLATES if kind == "speech" else _HIT_TEMPLATES
    text = re.sub(r"\s+", " ", templates[rng.integers(len(templates))](writer))
    return re.sub(r" ([,.])", r"\1", text).strip(" ,.")


def _article(noun_phrase: str) -> str:
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


def _canonical(kind: str, attributes: Mapping[str, str], person: str) -> str:
    a = attributes
    if kind == "speech":
        says = f"says {a['syllables']}" if "syllables" in a else "speaks"
        return (
            f"a {person} with {a['hair']} hair, {a['skin']} skin and {_article(a['shirt'])} shirt "
            f"on {_article(a['background'])} background {TEMPO_ADVERBS[a['tempo']][0]} {says} "
            f"in a {a['voice']} voice"
        )
    thing = _article(f"{a[kind]} {kind}")
    return (
        f"{thing} {_HIT_VERBS[kind][0]} {TEMPO_ADVERBS[a['tempo']][0]} "
        f"on {_article(a['background'])} background with a {a['pitch']} sound"
    )


class _Writer:
    """The phrases of one caption; a phrase whose attribute is not said is the empty string."""

    def __init__(
        self, kind: str, said: Mapping[str, str], person: str, rng: np.random.Generator
    ) -> None:
        self.kind, self.said, self.rng = kind, said, rng
        self.person = self.pick((person, person, "person"))

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def shuffled(self, phrases: Sequence[str]) -> list[str]:
        present = [phrase for phrase in phrases if phrase]
        return [present[i] for i in self.rng.permutation(len(present))]

    def phrase(self, key: str, *forms: str) -> str:
        """One of `forms`, with {} the value and {a} the value with its article."""
        if key not in self.said:
            return ""
        value = self.said[key]
        if key in {"voice", "pitch"}:
            value = self.pick(PITCH_WORDS[value])
        return self.pick(forms).replace("{a}", _article(value)).replace("{}", value)

    def background(self) -> str:
        return self.phrase(
            "background",
            "on {a} background",
            "in front of {a} background",
            "against {a} background",
            "with {a} background",
        )

    def adverb(self, before_verb: bool = False) -> str:
        if "tempo" not in self.said:
            return ""
        tempo = self.said["tempo"]
        options = TEMPO_ADVERBS[tempo]
        if not before_verb:
            options += (f"at a {self.pick(TEMPO_ADJECTIVES[tempo])} pace",)
            if tempo == "fast":
                options += ("fast",)
        return self.pick(options)

    def tempo_adjective(self) -> str:
        return self.pick(TEMPO_ADJECTIVES[self.said["tempo"]]) if "tempo" in self.said else ""

    def looks(self) -> str:
        """with red hair, pale skin and a green shirt (in any order), or nothing."""
        parts = self.shuffled(
            [
                self.phrase("hair", "{} hair"),
                self.phrase("skin", "{} skin"),
                self.phrase("shirt", "{a} shirt"),
            ]
        )
        if not parts:
            return ""
        listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
        return "with " + listed

    def says(self, continuous: bool = False) -> str:
        if "syllables" in self.said:
            verbs = ("saying", "repeating") if continuous else ("says", "repeats")
            return f"{self.pick(verbs)} {self.said['syllables']}"
        return self.pick(("speaking", "talking") if continuous else ("speaks", "talks"))

    def voice(self) -> str:
        return self.phrase("voice", "in a {} voice", "with a {} voice")

    def thing(self) -> str:
        return _article(" ".join(filter(None, (self.said.get(self.kind, ""), self.kind))))

    def verb(self) -> str:
        return self.pick(_HIT_VERBS[self.kind])

    def sound(self) -> str:
        return self.phrase(
            "pitch", "with a {} sound", "with a {} note", "with a {} tone", "and sounds {}"
        )

    def stroke(self) -> str:
        """The event told another way: who does what to the thing."""
        if self.kind == "drum":
            return f"a stick {self.pick(('hits', 'is hitting'))} {self.thing()}"
        doing = ("bouncing",) if self.kind == "ball" else ("ringing", "swinging")
        return f"it is {self.thing()}, {self.pick(doing)}"

    def facts(self, *keys: str) -> str:
        """the ball is red, the sound is low (in any order)."""
        nouns = {"pitch": self.pick(("sound", "note", "tone"))}
        return ", ".join(
            self.shuffled([self.phrase(key, f"the {nouns.get(key, key)} is {{}}") for key in keys])
        )


_SPEECH_TEMPLATES: tuple[Callable[[_Writer], str], ...] = (
    lambda w: f"a {w.person} {w.looks()} {w.background()} {w.adverb(True)} {w.says()} {w.voice()}",
    lambda w: f"{w.background()} a {w.person} {w.looks()} {w.says()} {w.adverb()} {w.voice()}",
    lambda w: (
        f"{w.voice()} a {w.person} {w.background()} {w.says()} {w.adverb()}. "
        f"{w.facts('hair', 'skin', 'shirt')}"
    ),
    lambda w: (
        f"a {w.person} is {w.says(True)} {w.adverb()}. "
        f"{w.facts('voice', 'hair', 'skin', 'shirt', 'background')}"
    ),
    lambda w: ", ".join(
        w.shuffled(
            [
                f"a {w.person} {w.says(True)}",
                w.tempo_adjective(),
                *(w.phrase(k, f"{{}} {k}") for k in ("hair", "skin", "shirt")),
                *(w.phrase(k, f"{{}} {k}") for k in ("background", "voice")),
            ]
        )
    ),
)

_HIT_TEMPLATES: tuple[Callable[[_Writer], str], ...] = (
    lambda w: f"{w.thing()} {w.verb()} {w.adverb()} {w.background()} {w.sound()}",
    lambda w: f"{w.background()} {w.thing()} {w.verb()} {w.adverb()} {w.sound()}",
    lambda w: (
        f"{w.thing()} {w.verb()} {w.adverb()} {w.sound()}, "
        f"{w.phrase('background', '{} background')}"
    ),
    lambda w: f"the {w.kind} {w.verb()} {w.adverb()}. {w.facts(w.kind, 'background', 'pitch')}",
    lambda w: ", ".join(
        w.shuffled(
            [
                f"{w.thing()} {w.verb()}",
                w.tempo_adjective(),
                w.phrase("background", "{} background"),
                w.phrase("pitch", "{} sound", "{} note", "{} tone"),
            ]
        )
    ),
    lambda w: f"{w.stroke()} {w.adverb()} {w.sound()} {w.background()}",
)
