"""The closed language of the world: attribute values, synonyms, and all words of its captions.

`VOCABULARY` is frozen: a text embedding indexes it by position, so words are only ever appended.
"""

from __future__ import annotations

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SKINS = ("pale", "tan", "brown")
PITCHES = ("low", "middle", "high")
TEMPI = ("slow", "steady", "fast")

CONSONANTS = ("b", "m", "d", "l", "s", "t")
VOWELS = ("a", "e", "i", "o", "u")
SYLLABLES = tuple(c + v for c in CONSONANTS for v in VOWELS)
MAX_SYLLABLES = 4
# A syllable's length of silence. It is no word: a caption can't say it, a transcript can.
REST = "--"

KINDS = ("speech", "ball", "bell", "drum")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "speech": ("hair", "skin", "shirt", "background", "voice", "tempo", "syllables"),
    "ball": ("ball", "background", "pitch", "tempo"),
    "bell": ("bell", "background", "pitch", "tempo"),
    "drum": ("drum", "background", "pitch", "tempo"),
}

PITCH_WORDS = {"low": ("low", "deep"), "middle": ("middle", "medium"), "high": ("high",)}
TEMPO_ADJECTIVES = {"slow": ("slow",), "steady": ("steady",), "fast": ("fast", "quick")}
TEMPO_ADVERBS = {"slow": ("slowly",), "steady": ("steadily",), "fast": ("quickly", "rapidly")}

SPEECH_VERBS = frozenset("says saying repeats repeating speaks speaking talks talking".split())
KIND_WORDS: dict[str, frozenset[str]] = {
    "ball": frozenset("ball bounces bouncing".split()),
    "bell": frozenset("bell swings swinging rings ringing".split()),
    "drum": frozenset("drum beats beating hits hitting stick".split()),
    "speech": frozenset("girl boy person voice hair skin shirt".split()) | SPEECH_VERBS,
}

VOCABULARY: tuple[str, ...] = (
    *COLOURS,
    *SKINS,
    *("low", "deep", "middle", "medium", "high"),
    *("slow", "slowly", "steady", "steadily", "fast", "quick", "quickly", "rapidly"),
    *("girl", "boy", "person", "hair", "skin", "shirt", "voice"),
    *("says", "saying", "repeats", "repeating", "speaks", "speaking", "talks", "talking"),
    *("ball", "bounces", "bouncing", "bell", "swings", "swinging", "rings", "ringing"),
    *("drum", "beats", "beating", "hits", "hitting", "stick"),
    *("a", "an", "the", "and", "is", "it", "on", "in", "at", "of", "with", "front", "against"),
    *("background", "sound", "sounds", "note", "tone", "pace"),
    *SYLLABLES,
)
