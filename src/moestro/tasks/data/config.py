"""Configs of data sets and vocabularies. A data set builds into a `DataSet` of plain values; nothing is downloaded."""

from __future__ import annotations

from typing import ClassVar, Literal

from ...core.config import Config, config
from ...core.errors import UserError


@config
class Data(Config):
    """Base of data sets. Files lie in a folder of their own; missing ones are an error that says where to get them."""

    slug: ClassVar[str] = ""
    source: ClassVar[str] = ""
    folder: str = ""
    """Folder with the files; empty = the data set's own folder below $MOESTRO_DATA, or the user's cache folder."""


@config
class _Shares(Data):
    """Data without an official split of its own: shares are held out."""

    validation: float = 0.1
    """Share held out for validation."""
    test: float = 0.1
    """Share held out for the test."""

    def __post_init__(self) -> None:
        if not (self.validation >= 0 and self.test >= 0 and self.validation + self.test < 1):
            raise UserError(
                f"{type(self).__name__}: validation {self.validation} and test {self.test} must be shares that leave "
                "something to train on"
            )


@config
class _Validation(Data):
    """Data with an official test set: validation is taken from the training rows."""

    validation: float = 0.1
    """Share of the training rows held out for validation."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise UserError(f"{type(self).__name__}.validation must be at least 0 and below 1, found {self.validation}")


# Language modelling -----------------------------------------------------------------------------------------------


@config
class TinyShakespeare(_Shares):
    """Tiny Shakespeare: one text; its tail is held out."""

    builds: ClassVar[str] = "moestro.tasks.data.language:tiny_shakespeare"
    slug: ClassVar[str] = "tiny_shakespeare"
    source: ClassVar[str] = "data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn"


@config
class WikiText2(_Shares):
    """WikiText-2 as word tokens. Without train.txt its test.txt is trained on, and valid.txt is cut in two."""

    builds: ClassVar[str] = "moestro.tasks.data.language:wikitext2"
    slug: ClassVar[str] = "wikitext2_valtest"
    source: ClassVar[str] = "word_language_model/data/wikitext-2/ of github.com/pytorch/examples"


@config
class Gutenberg(_Shares):
    """Whole books, files DOMAIN_TITLE.txt.gz; the domain is what stands before the first underscore."""

    builds: ClassVar[str] = "moestro.tasks.data.language:gutenberg"
    slug: ClassVar[str] = "gutenberg_domains"
    source: ClassVar[str] = "books of www.gutenberg.org, as text files named DOMAIN_TITLE.txt"


@config
class RussianPlays(_Shares):
    """Russian plays, one text."""

    builds: ClassVar[str] = "moestro.tasks.data.language:russian_plays"
    slug: ClassVar[str] = "rusdracor_plays"
    source: ClassVar[str] = "tei/ of github.com/dracor-org/rusdracor, as one text ru.txt"


@config
class ChinesePoetry(_Shares):
    """Tang poems, one text."""

    builds: ClassVar[str] = "moestro.tasks.data.language:chinese_poetry"
    slug: ClassVar[str] = "chinese_poetry"
    source: ClassVar[str] = "poet.tang.*.json of github.com/chinese-poetry/chinese-poetry, as one text zh.txt"


@config
class Domains(Config):
    """Several data sets as labelled domains of one text; a domain's number is the place of the data set in `parts`."""

    builds: ClassVar[str] = "moestro.tasks.data.language:domains"
    parts: tuple[Data, ...] = ()
    """The data sets, any kind; examples become text (question and solution, source and target, ...)."""
    split_books: bool = False
    """Data sets with domains of their own give one domain each of them, named "slug/domain"."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError("Domains.parts is empty; name at least one data set")


# Translation ------------------------------------------------------------------------------------------------------


@config
class Multi30k(Data):
    """Multi30k, task 1: image captions in English, German, French and Czech."""

    builds: ClassVar[str] = "moestro.tasks.data.translation:multi30k"
    slug: ClassVar[str] = "multi30k"
    source: ClassVar[str] = "data/task1/raw/ of github.com/multi30k/dataset"
    source_language: Literal["en", "de", "fr", "cs"] = "en"
    """Language translated from."""
    target_language: Literal["en", "de", "fr", "cs"] = "de"
    """Language translated to."""

    def __post_init__(self) -> None:
        if self.source_language == self.target_language:
            raise UserError(f"Multi30k: source and target language are both {self.source_language!r}; choose two")


# Classification ---------------------------------------------------------------------------------------------------


@config
class Banking77(_Validation):
    """Banking77: customers' queries, 77 intents."""

    builds: ClassVar[str] = "moestro.tasks.data.classification:banking77"
    slug: ClassVar[str] = "intents"
    source: ClassVar[str] = "banking_data/{train,test}.csv of github.com/PolyAI-LDN/task-specific-datasets"


@config
class Clinc150(Data):
    """CLINC150: 150 intents in 10 domains, and queries out of scope."""

    builds: ClassVar[str] = "moestro.tasks.data.classification:clinc150"
    slug: ClassVar[str] = "intents"
    source: ClassVar[str] = "data/data_full.json and data/domains.json of github.com/clinc/oos-eval"
    out_of_scope: bool = False
    """Keep queries that fit no intent, as the label "oos"."""


@config
class Tsac(_Validation):
    """TSAC: Tunisian comments, positive or negative."""

    builds: ClassVar[str] = "moestro.tasks.data.classification:tsac"
    slug: ClassVar[str] = "tsac"
    source: ClassVar[str] = "the text files of github.com/fbougares/TSAC, as rows {split, label, text}"


# Extractive question answering ------------------------------------------------------------------------------------


@config
class SquadShifts(_Shares):
    """SQuAD-format questions from new Wikipedia articles, Reddit or Amazon reviews; contexts are in one split only."""

    builds: ClassVar[str] = "moestro.tasks.data.spans:squadshifts"
    slug: ClassVar[str] = "squadshifts"
    source: ClassVar[str] = "datasets/{domain}_v1.0.json of github.com/modestyachts/squadshifts-website"
    domains: tuple[str, ...] = ("new_wiki",)
    """Which of new_wiki, reddit, amazon_reviews (nyt where its file is there)."""


@config
class CovidQA(_Shares):
    """COVID-QA: biomedical questions on windows of articles."""

    builds: ClassVar[str] = "moestro.tasks.data.spans:covid_qa"
    slug: ClassVar[str] = "covid_qa"
    source: ClassVar[str] = "data/question-answering/200423_covidQA.json of github.com/deepset-ai/COVID-QA"


@config
class Trcd(Data):
    """TRCD: questions on the Tunisian constitution, in dialect."""

    builds: ClassVar[str] = "moestro.tasks.data.spans:trcd"
    slug: ClassVar[str] = "trcd_tunisian_qa"
    source: ClassVar[str] = "dev-data/question_answering_trcd/ of github.com/instadeepai/tunbert"


# Sentence pairs ---------------------------------------------------------------------------------------------------


@config
class CoCitation(_Shares):
    """Papers of the ACL Anthology that are cited together; the domain of a pair is its community.

    The shares are of papers: a pair is in a split when both its papers are, other pairs and those between communities
    are left out. Held-out pairs have as many unrelated ones beside them, within the community.
    """

    builds: ClassVar[str] = "moestro.tasks.data.pairs:cocitation"
    slug: ClassVar[str] = "acl_cocitation"
    source: ClassVar[str] = "data/Training-Set-2019/Task1/ of github.com/WING-NUS/scisumm-corpus, as papers and pairs"
    validation: float = 0.15
    """Share of the papers held out for validation."""
    test: float = 0.25
    """Share of the papers held out for the test."""
    least: int = 1
    """Least number of papers that cite both."""


@config
class PubMedQA(_Shares):
    """PubMedQA: a question and the abstract it is answered by; held-out pairs have mismatched ones beside them."""

    builds: ClassVar[str] = "moestro.tasks.data.pairs:pubmedqa"
    slug: ClassVar[str] = "pubmedqa"
    source: ClassVar[str] = "data/ori_pqal.json of github.com/pubmedqa/pubmedqa"


@config
class PairDomains(Config):
    """Pairs of several data sets, a domain each: translations, questions and solutions, texts of one label, pairs."""

    builds: ClassVar[str] = "moestro.tasks.data.pairs:pair_domains"
    parts: tuple[Data, ...] = ()
    """The data sets, any but plain text."""
    train: int = 4000
    """Most training pairs of a domain."""
    held_out: int = 500
    """Most related pairs of a domain in validation and in test; as many unrelated ones are drawn within the domain."""

    def __post_init__(self) -> None:
        self.at_least(1, "train", "held_out")
        if not self.parts:
            raise UserError("PairDomains.parts is empty; name at least one data set")


# Reasoning --------------------------------------------------------------------------------------------------------


@config
class Gsm8k(_Validation):
    """GSM8K: worded problems with worked solutions."""

    builds: ClassVar[str] = "moestro.tasks.data.reasoning:gsm8k"
    slug: ClassVar[str] = "gsm8k"
    source: ClassVar[str] = "grade_school_math/data/{train,test}.jsonl of github.com/openai/grade-school-math"
    notes: bool = True
    """Keep the calculator notes <<...>> in solutions."""


@config
class WordProblems(_Shares):
    """ASDiv, SVAMP, MAWPS-single and AQuA: short worded problems with an equation, or a rationale, and the answer."""

    builds: ClassVar[str] = "moestro.tasks.data.reasoning:word_problems"
    slug: ClassVar[str] = "math_word_problems"
    source: ClassVar[str] = (
        "github.com/chaochun/nlu-asdiv-dataset, arkilpatel/SVAMP, LYH-YF/MWPToolkit (mawps-single) and deepmind/AQuA, "
        "as rows of JSON"
    )
    parts: tuple[str, ...] = ("svamp", "mawps_single", "asdiv", "aqua_devtest")
    """Which of them; each is a domain."""


@config
class Bbh(_Shares):
    """BIG-Bench Hard: 27 tasks, each a domain."""

    builds: ClassVar[str] = "moestro.tasks.data.reasoning:bbh"
    slug: ClassVar[str] = "bbh"
    source: ClassVar[str] = "bbh/*.json of github.com/suzgunmirac/BIG-Bench-Hard"


@config
class Mmlu(_Shares):
    """MMLU's test questions with their choices; subjects are domains."""

    builds: ClassVar[str] = "moestro.tasks.data.reasoning:mmlu"
    slug: ClassVar[str] = "mmlu_arc"
    source: ClassVar[str] = "code/data_mmlu/test/ of github.com/chujiezheng/LLM-MCQ-Bias, as rows of JSON"


@config
class Arc(_Validation):
    """ARC-Challenge: the dev questions are split into training and validation, the test questions are the test."""

    builds: ClassVar[str] = "moestro.tasks.data.reasoning:arc"
    slug: ClassVar[str] = "mmlu_arc"
    source: ClassVar[str] = "code/data_arc/ of github.com/chujiezheng/LLM-MCQ-Bias, as rows of JSON"


# Vocabularies -----------------------------------------------------------------------------------------------------


@config
class Vocabulary(Config):
    """Base of vocabularies: `build(texts, more=())` gives ids for text; `more` are names of further special tokens."""


@config
class ByteVocabulary(Vocabulary):
    """Bytes are their own ids, 0 to 255; special tokens follow."""

    builds: ClassVar[str] = "moestro.tasks.data.vocabulary:ByteTexts"


@config
class WordVocabulary(Vocabulary):
    """The most frequent words and punctuation marks of the training text; the rest is unknown."""

    builds: ClassVar[str] = "moestro.tasks.data.vocabulary:WordTexts"
    size: int = 15000
    """Most ids, special tokens included."""
    lower: bool = True
    """Upper and lower case are the same word."""

    def __post_init__(self) -> None:
        self.at_least(16, "size")


@config
class BpeVocabulary(Vocabulary):
    """Byte pairs learnt from the training text (package tokenizers), kept in the cache under a hash of that text."""

    builds: ClassVar[str] = "moestro.tasks.data.bpe:PairTexts"
    size: int = 4096
    """Most ids, special tokens and the 256 bytes included."""
    cache: str = ""
    """Folder that keeps what was learnt; empty = $MOESTRO_DATA, or the user's cache folder."""

    def __post_init__(self) -> None:
        self.at_least(300, "size")
