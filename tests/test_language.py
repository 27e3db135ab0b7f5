"""Normalizing twice is normalizing once; foreign texts are named, English and uncertain ones are kept."""
import gzip, os, re, subprocess, sys, unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lxml import etree

from biomamba.documents import read_documents, read_pubmedqa
from biomamba.language import READ, foreign, language_of, normalize
from biomamba.sample import sample_documents

DATA = Path(os.environ.get("BIOMAMBA_DATA", ""))
real = pytest.mark.skipif("BIOMAMBA_DATA" not in os.environ, reason="BIOMAMBA_DATA does not name a folder of real files")

# One sentence, translated for this test
SENTENCES = {
    "ar": "كان المرضى الذين تناولوا الدواء الجديد أقل ألماً من غيرهم بعد ستة أسابيع من العلاج.",
    "bg": "Пациентите, които приемаха новото лекарство, имаха по-малко болка след шест седмици лечение.",
    "cs": "Pacienti, kteří užívali nový lék, měli po šesti týdnech léčby méně bolestí než ostatní.",
    "de": "Die Patienten, die das neue Medikament einnahmen, hatten nach sechs Wochen weniger Schmerzen als die anderen.",
    "el": "Οι ασθενείς που έπαιρναν το νέο φάρμακο είχαν λιγότερο πόνο μετά από έξι εβδομάδες θεραπείας.",
    "es": "Los pacientes que tomaron el nuevo medicamento tuvieron menos dolor después de seis semanas de tratamiento.",
    "fi": "Uutta lääkettä käyttäneillä potilailla oli kuuden viikon hoidon jälkeen vähemmän kipua kuin muilla.",
    "fr": "Les patients qui prenaient le nouveau médicament avaient moins de douleurs après six semaines de traitement.",
    "he": "לחולים שנטלו את התרופה החדשה היו פחות כאבים לאחר שישה שבועות של טיפול.",
    "hi": "जिन रोगियों ने नई दवा ली, उन्हें छह सप्ताह के उपचार के बाद दूसरों की तुलना में कम दर्द हुआ।",
    "hu": "Az új gyógyszert szedő betegeknek hat hét kezelés után kevesebb fájdalmuk volt, mint a többieknek.",
    "it": "I pazienti che assumevano il nuovo farmaco avevano meno dolore dopo sei settimane di trattamento.",
    "ja": "新しい薬を服用した患者は、六週間の治療の後、ほかの患者よりも痛みが少なかった。",
    "ko": "새로운 약을 복용한 환자들은 육 주간의 치료 후에 다른 환자들보다 통증이 적었다.",
    "nl": "De patiënten die het nieuwe geneesmiddel gebruikten, hadden na zes weken behandeling minder pijn dan de anderen.",
    "pl": "Pacjenci, którzy przyjmowali nowy lek, odczuwali po sześciu tygodniach leczenia mniejszy ból niż pozostali.",
    "pt": "Os pacientes que tomaram o novo medicamento tiveram menos dor após seis semanas de tratamento.",
    "ro": "Pacienții care au luat noul medicament au avut mai puține dureri după șase săptămâni de tratament.",
    "ru": "Пациенты, принимавшие новое лекарство, после шести недель лечения испытывали меньше боли, чем остальные.",
    "sv": "Patienterna som tog det nya läkemedlet hade mindre smärta efter sex veckors behandling än de andra.",
    "tr": "Yeni ilacı alan hastaların altı haftalık tedaviden sonra diğerlerine göre daha az ağrısı vardı.",
    "uk": "Пацієнти, які приймали нові ліки, після шести тижнів лікування мали менше болю, ніж інші.",
    "vi": "Những bệnh nhân dùng thuốc mới ít đau hơn những người khác sau sáu tuần điều trị.",
    "zh": "服用新药的患者在六周治疗后的疼痛比其他患者少。",
}
ENGLISH = "The patients who took the new drug had less pain after six weeks of treatment than the others."


# Normalizing

odd = st.text(st.one_of(st.characters(), st.sampled_from("ab \n\r\t\x00\x0b\x0c\x1c\x1d\x1e\x1f\x7f\x85\xa0\u200b\u2028\u2029\u2060\ufeff\u0301\u0323\u3000\u2000\u1100\u1161")), max_size=30)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(odd)
@example("e\u200b\u0301")  # a blank of no width between a letter and its accent
@example("\n \u0301\n\n\n")
@example("a\r\r\n\x0c\u2029b")
def test_normalizing_twice_is_normalizing_once(text):
    once = normalize(text)
    assert normalize(once) == once == once.strip()
    assert unicodedata.is_normalized("NFC", once)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff]|\n{3}| \n|\n |  ", once)
    assert {c for c in once if c.isspace()} <= {" ", "\n"}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cf", "Zl", "Zp"]), max_size=30))
def test_no_word_is_touched(text):
    assert normalize(text).split() == unicodedata.normalize("NFC", text).split()


@pytest.mark.parametrize("raw, clean", [
    ("Title\nMETHODS: a.\nRESULTS: b.", "Title\nMETHODS: a.\nRESULTS: b."), ("one\n\n\n\ntwo", "one\n\ntwo"), ("one\r\rtwo\r\n three", "one\n\ntwo\nthree"),
    ("\ufefftext", "text"), ("so\x00me\x07", "some"), ("a\u2028b\u2029c", "a\nb\n\nc"), ("e\u0301", "é"), ("\u00a0 \t", ""), ("x\u3000y", "x y"), ("ﬁ½", "ﬁ½"),
])
def test_lines_paragraphs_and_characters(raw, clean): assert normalize(raw) == clean


# Languages

@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_is_recognised(code):
    found, confidence = language_of(SENTENCES[code])
    assert found == code and 0.3 < confidence <= 1
    assert foreign(SENTENCES[code]) == code == foreign(" ".join([SENTENCES[code]] * 20)) == foreign(SENTENCES[code].upper())


@pytest.mark.parametrize("code", ["de", "zh"])
def test_a_text_in_two_languages_is_kept(code):
    other = SENTENCES[code] * 10
    assert foreign(other + ENGLISH * 10) == foreign(ENGLISH * 10 + other) == "" != foreign(other)
    assert foreign(SENTENCES[code] * 10 + ENGLISH + SENTENCES[code] * 10) == code, "a sentence of English in the middle"


@pytest.mark.parametrize("text", ["", " ", "12.5 ± 0.3 (n = 7)", "☃", "\x00", "\ud800", "GATTACA" * 60, "TP53, BRCA1, EGFR, KRAS, BRAF, PTEN, APC, VHL", "C1=CC=C(C=C1)C(=O)O",
                                  "Plasmodium falciparum merozoites in vitro.", "Lupus erythematosus.", "Placenta praevia et accreta.", "In memoriam.", "Late, late doxorubicin cardiotoxicity.", "https://www.e.org/a?b=c", ENGLISH, ENGLISH.upper()])
def test_what_is_uncertain_is_kept(text):
    code, confidence = language_of(text)
    assert re.fullmatch("[a-z]{2}", code) and 0 <= confidence <= 1 and type(confidence) is float
    assert foreign(text) == ""


def test_only_the_beginning_and_the_end_are_read():
    assert language_of("x" * READ + SENTENCES["ru"]) == language_of("x" * READ)
    assert language_of(ENGLISH)[0] == "en" and language_of(ENGLISH)[1] > 0.9


def test_the_sample_is_english():
    for source in ("pubmed", "c4", "wikipedia"):
        assert not [d.id for d in sample_documents(source, 200) if foreign(d.text) or language_of(d.text)[0] != "en"]


def test_importing_the_room_loads_no_model():
    code = "import sys, biomamba.language as l; assert 'py3langid' not in sys.modules and 'numpy' not in sys.modules; l.language_of('x'); assert 'py3langid' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


# Real files: counts alone

def real_texts(name):
    if name == "pubmedqa": return [d.text for d in read_pubmedqa(DATA / "qa/ori_pqal.json")]
    return [d.text for d in read_documents(DATA / name, "s")]


@real
@pytest.mark.parametrize("name, count, called", [("pubmed/abstracts.jsonl", 3000, 3000), ("general/c4.jsonl", 800, 796), ("general/wikipedia.jsonl", 50, 50), ("pubmedqa", 1000, 1000)])
def test_real_english_is_kept(name, count, called):
    texts = real_texts(name)
    assert len(texts) == count and not [i for i, text in enumerate(texts) if foreign(text)]
    assert sum(language_of(text)[0] == "en" for text in texts) == called
    assert all(normalize(normalize(text)) == normalize(text) for text in texts)


@real
def test_real_titles_are_kept():
    titles = [text.split("\n")[0] for text in real_texts("pubmed/abstracts.jsonl")]
    assert sum(language_of(title)[0] == "en" for title in titles) > 2900 and not any(map(foreign, titles))


@real
def test_the_language_field_is_not_the_language_of_the_text():
    records = list(read_documents(DATA / "pubmed/pubmedsample18n0001.xml.gz", "pubmed"))
    other = [d for d in records if d.meta["language"] not in ("eng", "und")]
    assert len(other) == 24 and Counter(foreign(d.text) for d in other) == {"": 23, "nl": 1}
    assert sum(language_of(d.text)[0] == "en" for d in other) >= 12, "records of other languages with English text"
    assert not [d.id for d in records if d.meta["language"] == "eng" and foreign(d.text)]


@real
def test_real_text_in_other_languages():
    root = etree.parse(gzip.open(DATA / "pubmed/pubmedsample18n0001.xml.gz"))
    german, = [" ".join(e.itertext()) for e in root.iter("OtherAbstract") if e.get("Language") == "ger"]
    english = [" ".join(e.itertext()) for e in root.iter("OtherAbstract") if e.get("Language") == "eng"]
    assert foreign(normalize(german)) == "de" and len(english) == 4 and not any(foreign(normalize(text)) for text in english)
    titles = [e.text for e in root.iter("VernacularTitle") if len(e.text) > 40]
    assert len(titles) == 11 and not [t for t in titles if language_of(t)[0] == "en"] and sum(map(bool, map(foreign, titles))) == 6


