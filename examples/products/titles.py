"""Titles and spoken sentences for second-hand listings. Every split has templates of its own; words are shared.

A title is a template filled with words. `{t}` is the thing (a name or a telling detail), the other slots say nothing
about the category or hint at it as real listings do (a size, a material). Brands are made up.
"""

from __future__ import annotations

import random as random_module
import re
from dataclasses import dataclass

LABEL_WORD = re.compile(
    r"\b(t-?shirts?|trousers?|pullovers?|dress(es)?|coats?|sandals?|shirts?|sneakers?|bags?|ankle|boots?)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Words:
    """What sellers call one category. `named` holds a word of the label; `other` and `details` hold no label's word."""

    named: tuple[str, ...]
    other: tuple[str, ...]
    details: tuple[str, ...]
    materials: tuple[str, ...]
    sizes: tuple[str, ...]
    spoken: tuple[str, ...]


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.replace("\n", " ").split(",") if part.strip())


_TOP_SIZES = _split("S, M, L, XL, size 10, size 12, size 14, medium, large, 38 chest, fits like a M")
_SHOE_SIZES = _split("EU 37, EU 39, EU 42, UK 4, UK 6, UK 8.5, US 9, 43, size 40, half size up")

CATEGORIES: dict[str, Words] = {
    "T-shirt": Words(
        _split(
            "T-shirt, graphic T-shirt, band T-shirt, V-neck T-shirt, oversized T-shirt, "
            "tshirt with print, tour T-shirt"
        ),
        _split("tee, graphic tee, crew neck tee, boxy tee, ringer tee, tank top, muscle tee, cropped tee, concert tee"),
        _split(
            "short sleeves crew neck, printed front and short sleeves, "
            "band merch with tour dates on the back, logo print on chest"
        ),
        _split("cotton, organic cotton, jersey, slub cotton, cotton blend"),
        _TOP_SIZES,
        _split("t-shirt, graphic tee, short sleeved tee, band t-shirt, cotton tee, tank top"),
    ),
    "trousers": Words(
        _split("trousers, pleated trousers, wide-leg trousers, suit trousers, cropped trousers, linen trousers"),
        _split("chinos, slacks, cargo pants, jeans, joggers, corduroy pants, culottes, leggings, straight-leg jeans"),
        _split("tapered leg and belt loops, high waist wide leg, zip fly and turn-ups, mid rise with back pockets"),
        _split("denim, corduroy, twill, linen, wool blend, stretch cotton"),
        _split("W30 L32, W32 L34, W34, waist 31, size 12 long, 32/32, inside leg 30, M"),
        _split("pair of trousers, pair of jeans, pair of chinos, pair of joggers, pair of pants, pair of slacks"),
    ),
    "pullover": Words(
        _split("pullover, knitted pullover, half-zip pullover, V-neck pullover, ribbed pullover, fleece pullover"),
        _split("jumper, sweater, hoodie, sweatshirt, turtleneck knit, cable knit jumper, crewneck sweater, roll neck"),
        _split(
            "chunky knit with ribbed cuffs, cable knit long sleeves, hooded with kangaroo pocket, "
            "ribbed hem no zip"
        ),
        _split("merino, lambswool, fleece, cashmere mix, acrylic knit, cotton knit"),
        _TOP_SIZES,
        _split("pullover, woolly jumper, sweater, hoodie, sweatshirt, knitted pullover"),
    ),
    "dress": Words(
        _split("dress, midi dress, wrap dress, summer dress, shift dress, evening dress, maxi dress, shirred dress"),
        _split("gown, sundress, pinafore, frock, ballgown, maxi with side slit, bodycon midi, slip midi"),
        _split(
            "knee length with flared skirt, fitted waist and full skirt, floral midi with tie waist, "
            "strappy A-line midi"
        ),
        _split("chiffon, satin, viscose, crepe, lace, linen"),
        _split("UK 8, UK 10, size 12, size 14, S, M, petite 10, EU 38"),
        _split("summer dress, evening gown, wrap dress, long dress, sundress, party frock"),
    ),
    "coat": Words(
        _split("coat, trench coat, winter coat, duffle coat, wool coat, puffer coat, overcoat coat"),
        _split("parka, overcoat, peacoat, anorak, puffer jacket, mac, padded jacket, windbreaker, blazer jacket"),
        _split(
            "double breasted and fully lined, full zip with padded hood, toggle front heavy wool, "
            "lined with storm flap"
        ),
        _split("wool, quilted nylon, gabardine, waxed cotton, down filled, waterproof shell"),
        _TOP_SIZES,
        _split("winter coat, trench coat, warm parka, overcoat, padded jacket, raincoat"),
    ),
    "sandal": Words(
        _split("sandals, strappy sandals, gladiator sandals, wedge sandals, leather sandals, platform sandals"),
        _split("flip flops, slides, espadrille wedges, open-toe heels, mules, strappy heels, pool sliders, thongs"),
        _split("open toe with buckle strap, peep toe slingback, cork footbed two straps, toe post summer footwear"),
        _split("leather, cork, faux suede, rubber, raffia"),
        _SHOE_SIZES,
        _split("pair of sandals, pair of flip flops, pair of slides, open toe heel, strappy sandal, pair of mules"),
    ),
    "shirt": Words(
        _split("shirt, flannel shirt, Oxford shirt, denim shirt, short sleeve shirt, linen shirt, check shirt"),
        _split("blouse, button-down, tunic, polo, overshirt, pussy-bow blouse, Oxford button-up, camp collar top"),
        _split(
            "collar and button front, button cuffs with chest pocket, mother of pearl buttons, "
            "cutaway collar slim fit"
        ),
        _split("cotton, poplin, flannel, chambray, linen, silk"),
        _split("S, M, L, XL, collar 15.5, collar 16, size 12, slim M, 40 chest"),
        _split("button up shirt, silk blouse, flannel shirt, office shirt, polo, checked shirt"),
    ),
    "sneaker": Words(
        _split("sneakers, high-top sneakers, retro sneakers, canvas sneakers, slip-on sneakers, chunky sneakers"),
        _split("trainers, running shoes, tennis shoes, plimsolls, skate shoes, runners, court shoes low, gym kicks"),
        _split(
            "lace-up with gum sole, mesh upper foam midsole, cushioned runner barely worn soles, "
            "suede low tops white sole"
        ),
        _split("mesh, canvas, suede, leather, knit upper"),
        _SHOE_SIZES,
        _split("pair of sneakers, pair of trainers, running shoe, tennis shoe, pair of plimsolls, canvas sneaker"),
    ),
    "bag": Words(
        _split("bag, shoulder bag, tote bag, crossbody bag, bucket bag, weekend bag, laptop bag"),
        _split("handbag, clutch, backpack, satchel, purse, tote, crossbody, rucksack, holdall, messenger"),
        _split(
            "zip top with shoulder strap, detachable strap and inner pockets, "
            "gold chain strap magnetic clasp, roomy with two handles"
        ),
        _split("leather, canvas, vegan leather, nylon, suede, straw"),
        _split("one size, A4 size, 12 litres, 20 litres, small, large, mini, 30 x 22 cm"),
        _split("hand bag, leather bag, tote bag, backpack, clutch purse, shoulder bag"),
    ),
    "ankle boot": Words(
        _split("ankle boots, Chelsea boots, leather boots, heeled boots, lace-up boots, desert boots, biker boots"),
        _split(
            "booties, Chelseas, chukkas, desert chukkas, heeled booties, winter footwear lined, combats, "
            "side-zip bootees"
        ),
        _split("elastic side panels block heel, pull tab and chunky heel, zip side block heel, lug sole lace-up high"),
        _split("leather, suede, nubuck, patent, faux leather, shearling lined leather"),
        _SHOE_SIZES,
        _split("pair of ankle boots, Chelsea boot, leather boot, pair of booties, heeled boot, ankle boot"),
    ),
}  # fmt: skip

BRANDS = _split(
    """Fjordane, Nellwick, Oakbarrow, Tarn & Co, Velmora, Brixley, Juno Hart, Maribel Stone, Kestrup, Lindqvale,
    Osterby, Hallowmere, Penrose Lane, Quillfeather, Rimaldi Nove, Sundvik, Thornaby, Ulverton, Wrenmoor, Zephyrine,
    Caldera Nine, Dunmarrow, Eastfold, Gable & Finch"""
)
COLOURS = _split(
    """black, white, navy, grey, beige, olive, burgundy, cream, brown, tan, rust, teal, pale blue, dusty pink, charcoal,
    mustard, khaki, off-white, red, forest green, black and white, multicoloured"""
)
CONDITIONS = _split(
    """as new, worn twice, good used condition, never worn, brand new with tags, tags still on, BNWT,
    excellent condition, gently used, unworn, very good condition, small mark, vintage, pre-loved, light wear,
    like new, ex display"""
)
EXTRAS = _split(
    """smoke-free home, posted same day, see pictures, bargain, no returns, RRP 89, unwanted gift,
    selling for my sister, collection or post, moving sale, offers welcome, bundle and save, rare find, genuine,
    final price, pet-free home, limited edition, last season, wardrobe clear-out, quick sale"""
)

INFORMATIVE = {
    "train": (
        "{b} {t} {c} {s}",
        "{c} {t} by {b}, {q}",
        "{b} {m} {t} - {q}",
        "{t} {s} {c} {q}",
        "{q} {b} {t}",
        "{m} {t}, {c}, {x}",
        "{b} - {t} - {s} - {x}",
        "{c} {m} {t} ({s})",
        "{t} from {b}, {x}",
        "{x}: {b} {t} in {c}",
        "womens {c} {t} {s}",
        "mens {b} {t} {q}",
        "lovely {t}, {m}, {s}",
        "{b} {c} {t}. {q}, {x}",
        "{s} {t} {b}",
        "2 year old {t}, {c} {m}, {q}",
    ),
    "tune": (
        "{t} / {b} / {s}",
        "{b}: {c} {t}, {q}",
        "stunning {c} {t} {x}",
        "{t} ({b}, {m}), {q}",
        "{c} {t} size: {s} - {b}",
        "{q}! {m} {t} {s}",
        "unisex {t} {b} {x}",
        "{t}, only tried on, {c}",
        "my favourite {b} {t} in {c}",
    ),
    "test": (
        "{b} | {t} | {c}",
        "{t} in {c} {m}, {s}",
        "ladies {b} {t} - {c} - {q}",
        "beautiful {m} {t} by {b}",
        "{q} {c} {t}, {s}",
        "{b} {t} *{x}*",
        "gorgeous {t}, {c}, {b}, {s}",
        "{s} - {c} {t} - {x}",
        "{t}: {b}, {q}, {x}",
    ),
}

VAGUE = {
    "train": (
        "{b} {c} {q}",
        "{q}, {x}",
        "lovely {b} piece in {c}",
        "{c}, {q}, {x}",
        "{b} item, {x}",
        "gift idea {b} {c}",
        "{x}, {b}",
        "{b} original, size on photo",
        "please read description, {q}",
    ),
    "tune": (
        "{b} / {c} / {q}",
        "item by {b}, {x}",
        "{c} beauty, {q}",
        "must go! {b} {x}",
        "{q} {b}, size in the photo",
    ),
    "test": (
        "{b} | {c} | {x}",
        "great {c} find by {b}",
        "{q} - {b} - ask for size",
        "treat yourself: {b}, {q}",
        "{x} ({b}, {c})",
    ),
}

SENTENCES = {
    "train": (
        "This is a {t}.",
        "This one's a {t}, new in box.",
        "Here I have a {t}, hardly used.",
        "Next item, a {t}.",
        "It's a {t}, bought last year.",
        "Selling a {t} today.",
        "A {t}, in good shape.",
        "What we have here is a {t}.",
        "One {t}, and it's clean.",
        "The photo shows a {t}.",
        "I never wore this {t}.",
        "My old {t}, still fine.",
        "Hello, I want to sell a {t}.",
        "Have a look at my {t}.",
        "{t}, size as on the label.",
        "The {t} is three months old.",
        "There's a {t} in this box, unopened.",
        "Please find a {t} here.",
        "We bought this {t} in spring.",
        "For ten pounds, a {t}.",
        "A very pretty {t}, I only wore it once.",
        "Item four, {t}, some wear.",
        "It was a present, this {t}.",
        "Yes, it's a {t}.",
        "You are looking at a {t}, nearly new.",
        "A {t}.",
        "Right, a {t}, from a smoke free home.",
        "Make me an offer for the {t}.",
        "My daughter's {t}, she outgrew it.",
        "Moving house, so here goes my {t}.",
        "Good morning, one {t}, please.",
        "Too small for me, this {t}.",
        "The next one is a {t} as well.",
        "Someone gave me a {t} and I don't need it.",
        "Last but not least, a {t}.",
        "Well, I think it's a {t}.",
        "A used {t}, washed and ironed.",
        "Can anybody use a {t}?",
        "This {t} has six pockets.",
        "Take this {t}, it's cheap.",
        "Black {t}, never out of the wardrobe.",
        "A blue {t}, a bit faded.",
        "The red {t} from the picture.",
        "Here comes a {t}, original price sixty.",
    ),
    "tune": (
        "So, this is my {t}.",
        "Another {t}, as good as new.",
        "Number seven is a {t}.",
        "You get one {t}.",
        "That's a {t}, from my sister.",
        "A nice {t}, no stains.",
    ),
    "test": (
        "Okay, a {t} for sale.",
        "I'm selling this {t}.",
        "Look, a lovely {t}.",
        "Up next, one {t}, worn once.",
        "Got a {t} here, two years old.",
        "That would be a {t}, I think.",
    ),
}

_NAMED_SHARE, _OTHER_SHARE = 0.42, 0.44  # of informative titles; the rest show a detail only
_STYLES = ("plain", "plain", "plain", "lower", "capitals")


def _finish(title: str, random: random_module.Random) -> str:
    style = random.choice(_STYLES)
    if style == "lower":
        return title.lower()
    if style == "capitals":
        first, _, rest = title.partition(" ")
        return f"{first.upper()} {rest}".strip()
    return title[:1].upper() + title[1:]


def _fill(template: str, label: str, thing: str, random: random_module.Random) -> str:
    words = CATEGORIES[label]
    filled = template.format(
        b=random.choice(BRANDS), c=random.choice(COLOURS), q=random.choice(CONDITIONS), x=random.choice(EXTRAS),
        m=random.choice(words.materials), s=random.choice(words.sizes), t=thing,
    )  # fmt: skip
    return _finish(filled, random)


def informative(label: str, split: str, random: random_module.Random) -> str:
    words, draw = CATEGORIES[label], random.random()
    if draw < _NAMED_SHARE:
        things = words.named
    elif draw < _NAMED_SHARE + _OTHER_SHARE:
        things = words.other
    else:
        things = words.details
    return _fill(random.choice(INFORMATIVE[split]), label, random.choice(things), random)


def vague(split: str, random: random_module.Random) -> str:
    template = random.choice(VAGUE[split])
    assert not re.search("{[tms]}", template)  # would tell the category
    return _fill(template, "bag", "", random)


def sentence(label: str, split: str, random: random_module.Random) -> str:
    text = random.choice(SENTENCES[split]).format(t=random.choice(CATEGORIES[label].spoken))
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)
