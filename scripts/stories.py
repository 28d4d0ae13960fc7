"""Short English children's stories from a hand-written grammar.

The stories are the training text of the small model in `clp/tiny`. They are made so that two
objectives pull apart: "joy" (sentiment of the text) and "brief" (few words). A story is one opening
sentence and one to six more. Each further sentence is plain (no sentiment, mostly 4 to 6 words),
sad (5 to 8) or happy (7 to 10, with one positive word): more joy costs more words.
After each sentence the story may end, so short and long stories are both natural.

Notation of the templates: `[a|b]` is a free choice, `{slot}` is filled from the story's state or
from a word list. Every template is one sentence without its full stop.

`{S}` hero as subject (He, She or the name) · `{s}` he, she · `{o}` him, her · `{his}` his, her ·
`{kin}` the story's second person · `{it}` the hero's thing · `{at}` where the story is · `{to}` a
new place · `{an}` an animal · `{pet}` the last animal named · `{ans}` animals · `{few}` some of
them · `{look}` how a thing looks · `{kind}` and `{nice}` a good side of it · `{food}` · `{bit}`.

Example: `story(random.Random(1))` gives `["Tom had a red kite.", "He walked to the park.", ...]`.
"""

import random
import re


def listed(text: str) -> list[str]:
    """The entries of a word list: divided by `|`, or else by spaces."""
    return [entry.strip() for entry in (text.split("|") if "|" in text else text.split())]


BOYS = listed("Tom Ben Max Leo Jack Finn Noah Oscar Hugo Theo Luke Sam")
GIRLS = listed("Eva Anna Lily Ella Ruby Zoe Nora Ivy Clara Emma Rosa Maya")
NAMES = BOYS + GIRLS
THINGS = listed("""kite ball boat drum hat box lamp basket key map book coat scarf cup flute robot
train rope spoon bucket bag clock ring blanket mirror mask wagon sled pillow jar""")
LOOKS = listed("red blue green yellow brown white black pink old new little big tiny")
KIN = listed("""{his} sister|{his} brother|{his} cousin|{his} aunt|{his} uncle|{his} mother|
{his} father|{his} grandma|{his} grandpa|the farmer|the baker|Peter|Alice|Harry|Kate|Simon|
Jane|Henry|Lucy|Paul|Bella|Oliver""")
PLACES = listed("""in park|at farm|at beach|in forest|in garden|at school|by lake|on hill|at market|
by river|in barn|in village|in meadow|by pond|at station|in castle|at zoo|in library|on island|
in cave|in kitchen|in yard|in attic|in field""")
ANIMALS = listed("""cat dog duck frog goat hen horse bird turtle owl lamb rabbit cow crab bear bee
spider pig snail donkey camel seal monkey robin""")
FOODS = listed("""bread soup cake cheese rice pie jam eggs pears melon plums berries carrots beans
toast apples corn fish""")
NUMBERS = listed("two three four five six seven nine ten some")
KIND = listed("friendly playful gentle lively funny clever brave cute jolly happy strong")
NICE = listed("pretty special neat nice grand sweet funny good handsome cute lovely")
DISHES = listed("hot cold red green yellow")
BITS = listed("shell leaf coin button pebble acorn feather flower stick stone")
WHEN = ["Then", "Soon", "Later", "That night", "After lunch", "At noon", "The next day"]

OPENINGS = """
{name} had a {full}. {name} had a {full} and a {look} {an}. {name} got a {full} from {kin}.
One [day|morning|evening] {name} found a {full} {at}. {name} took a {full} {to}.
{name} saw a {full} {at}. {name} kept a {full} under the bed. {name} and {kin} made a {full}.
{name} bought a {full} {at}. {name} carried a {full} {to}. {name} and {kin} had a {full}.
One [morning|evening|winter] {name} took a {full} {to}. {name} and {kin} found a {full} {at}.
{name} was [five|six|seven] and had a {full}. One [spring|summer|winter] {name} made a {full}.
{name} and {kin} painted a {full}. {name} gave {kin} a {full}. {name} painted a {full} for {kin}.
{name} went {to} with a {full}. {name} brought {kin} a {full}. {name} held a {full} and waited {at}.
"""

PLAIN = """
{S} sat on a [log|rock|bench|chair|wall]. {S} put the {it} [down|away|outside|by the door].
{S} looked [up|around|at {kin}|out the window]. {S} [walked|went|ran|hurried] {to}.
{S} ate some {food}[| and {food}| at noon]. A {look} {an} [walked by|went past|came in].
It was [nearly|just past] [noon|dusk|midnight]. It was a [cloudy|windy|cold|long] [day|evening].
The wind came from the [sea|hill|road|river]. {kin} opened the [door|window|gate|curtain].
{S} counted {few}. {S} [held|carried|lifted|turned|dropped] the {it}.
{S} [took|brought|carried] the {it} [home|outside|upstairs|inside].
{S} wrote a [word|letter|name] on paper. {S} [found|kept|picked up] a {look} {bit}.
{S} asked {kin} [a question|the time]. {kin} was {at}. {S} asked for some {food}.
{S} waited [for {kin}|by the gate|until noon]. {kin} [came along|looked up|sat down|walked over].
{S} [drank|poured] some [water|milk|tea|juice]. {S} [swept|washed|painted] the [floor|stairs|fence].
The {it} was [on the floor|by the door|under the bed|near the wall].
[Two|Three|Six] {ans} [crossed the road|sat there|looked on|ate grass].
{S} [put on|tied|took off] {his} [boots|gloves|shoes]. {S} [saw|heard|met|fed|drew] a {look} {an}.
{S} talked [to|with] {kin}[| again| outside]. {S} [stood up|went inside] and waited.
After [lunch|supper|school] {s} [read|drew|walked|slept] [outside|upstairs|there].
{S} climbed the [stairs|ladder|tower|fence]. The road went past [a {look} house|the {look} gate].
{S} lit a [candle|lantern|stove]. {S} read [a page|a letter] [outside|to {kin}].
{S} [drew|painted] [a {an}|{kin}|the {it}] on paper. {S} planted [beans|corn|seeds] there.
There was snow on the [roof|road|fence|{it}]. [Rain|Snow|Fog] came in the [night|evening|morning].
{S} folded the [paper|cloth|letter]. {S} took the bus [home|to town|to school].
{S} [stood|waited|sat] {at}. {S} [sat|stood|walked] [near|behind|beside] {kin}. {S} saw {kin} {at}.
{S} cooked {food} [and {food}|for {kin}]. {S} bought some {food} [there|in town|for {kin}].
The {pet} [ate|sniffed|looked at] some {food}.
The {pet} [slept|sat|stood] [under|near] a {look} chair.
{S} [rolled|pushed|pulled] a {look} [barrel|cart|log]. {S} [closed|opened|painted] the [door|gate].
{S} wore a {look} [shirt|cap|sweater]. {S} hung the {it} [up there|outside|on a tree].
{S} stood [on one leg|in line|in the rain]. {S} got up at [dawn|six|seven].
Soon it was [dark|winter].
{S} went to bed [early|late|at nine]. The [sun|moon] came up [slowly|at six|again].
{kin} [cooked|ate|bought|brought] some {food}. {kin} [took|held|looked at|asked about] the {it}.
{S} showed {kin} the {it}. {S} gave {kin} a {look} {bit}. {S} [threw|washed|dropped] a {bit}.
{S} had {food} for [lunch|supper|breakfast]. {S} [skipped|hopped|ran] past {kin}.
{S} [spoke|whispered] to the {pet}. Leaves fell on the [path|grass|roof|{it}].
A {look} [bus|cart] went past [{kin}|the {look} house]. {S} filled a {look} bowl with [sand|water].
{S} mixed [flour|eggs] and [water|milk]. {S} built a {look} [tower|wall|house].
{S} dug a hole [there|in the sand|at noon]. {S} followed [the {pet}|{kin}|a path] [home|inside].
{S} [swam|floated] [to a rock|past {kin}]. {S} thought about [the {it}|{kin}|some {food}|school].
{S} packed the {it}[| and some {food}]. {S} wrapped the {it} in [paper|cloth|leaves].
{S} listened to [the wind|the rain|{kin}|the {ans}]. The [grass|path|road] was [wet|cold|brown].
{S} crossed the [bridge|road|river|path]. {kin} lived near the [bridge|sea|station|{look} tower].
{S} [brushed|washed|fed|chased] the {pet}. {S} stayed [inside|there] [all day|until dark].
{S} lay on the [grass|floor|sofa|bed]. {kin} called from the [window|gate|roof].
{S} sat [under|near] a {look} [tree|wall|fence]. {S} moved a {look} [chair|table|ladder].
{S} [threw|rolled|passed] the {it} to {kin}. {S} [heard|saw|met|fed] {few} {at}.
{kin} [saw|heard] the {pet}.
{S} hurried past {few}. {S} painted the {look} [wall|chair|cart|bowl]. {S} carried {few} home.
The {pet} ran [inside|outside|to {kin}|past {few}]. {kin} sat on a {look} [rock|chair|log].
{S} [dropped|packed|passed] some {food} [there|again|at noon]. {S} [found|drew] {few} [there|again].
[Two|Three|Some] {ans} [stood|sat|slept|waited] near the {look} [tree|wall|gate|barrel].
{kin} had {few}. {kin} [fed|washed|drew|painted] a {look} {an}.
"""

SAD = """
{S} [cried|sobbed|wept] [under|behind|near] the {look} [stairs|table|bed|curtain|wall].
{S} was [sad|upset|lonely|worried|nervous|scared] {at}. {S} lost a {look} [shoe|glove|{bit}].
{S} was [angry|annoyed|upset] with {kin} [all day|again]. {S} missed {kin} [that night|all day].
{kin} [argued|fought] with {o} about the {it}. {kin} was [angry|upset|worried] about some {food}.
The {pet} hurt its [leg|ear|nose|foot]. The {it} was [broken|torn|dirty|ruined] [again|by noon].
A [scary|nasty|rude] {an} [chased|followed] {kin} [home|inside|{to}].
{S} felt [sick|weak|tired|sore|ashamed] [after lunch|that night|in bed|{at}].
{S} had a sore [knee|toe|ear|leg] [that day|all week]. Tears ran down {his} [face|nose].
{kin} said the {food} tasted [bad|awful|bitter]. {S} was alone {at} [again|after dark].
The [storm|wind|noise] frightened {kin} and the {ans}. {S} got stuck in [a ditch|the mud|a tree].
{S} made a mess of the {food} {at}. {kin} [ignored|blamed] {o} [that day|again].
{S} had a [bad|terrible|horrible] [cold|lunch|week|fall]. It was a [gloomy|dull] [day|winter] {at}.
The {pet} was [sick|scared|weak] and [wet|thin|cold]. {S} worried about [{ans}|the storm|the {it}].
Too much rain ruined the [corn|flowers|path|{food}]. {S} failed to [fix|lift|open] the {look} gate.
{S} was too [tired|weary|weak|upset] to [walk|talk|eat|climb|read].
Nobody came and {s} felt [lonely|sad|unhappy|bored]. {S} broke a {look} [plate|window|chair].
Someone had stolen the [milk|{food}|{look} {bit}].
There was trouble with the {look} [roof|{an}|wheel].
{S} made a mistake with the [paint|flour|{food}]. {S} was [bored|confused] by [school|{kin}] again.
A {look} [spider|{an}] [startled|frightened|scared] {kin} {at}. The [house|road] was [empty|dirty].
{S} hurt {his} [knee|toe|ear] on [a {look} rock|the gate|the fence].
{kin} was too [sick|tired|angry] to [come|talk|eat]. {S} felt [guilty|bad|sad] about the {it}.
The {ans} were [scared|frightened|startled] by {kin}. A rude {an} ate some {food}.
{S} wasted [the flour|the paint|some {food}]. {S} walked home alone in the [rain|snow|fog].
The {pet} was trapped [under|behind] a {look} [barrel|fence]. The bus left and {s} [cried|wept].
{kin} was scared of {few} {at}. {kin} lost the {look} [{bit}|shoe] {at}.
Then {few} fought near the {it}.
The {pet} cried and ran past {kin}. {S} [cried|sobbed|wept] when {kin} [went home|took the {it}].
{kin} broke the {look} [plate|chair|{bit}]. A sick {an} lay near the {look} [wall|gate|stove].
{S} had trouble with {few} {at}. An angry {an} [chased|followed] {few} {to}.
{kin} ruined [the {it}|some {food}|the {look} wall]. {S} missed the bus {to}.
{S} was bored with {kin}.
{S} and {kin} [argued|fought] about {few}. {S} felt [lonely|sad|tired|weak] {at} without {kin}.
{S} had an ugly {look} bump {at}. {S} sadly [packed|dropped|washed] the {it}.
"""

HAPPY = """
{S} [smiled|grinned] at {kin} and the {look} {an}.
{S} and {kin} had fun with the {it} [outside|{at}].
{kin} gave {o} a [gift|hug|treat|surprise] and some {food}.
{kin} [admired|praised] the {it} and [took it home|drew {ans}|ate some {food}].
{S} [sang|hummed] a [merry|jolly|funny|sweet|cheerful] song about [{kin}|{ans}|a {look} {an}].
A {kind} {an} [walked|hopped|ran] [up to|past] {kin} {at}.
{S} felt [glad|proud|happy|lucky|calm] as {s} [went|walked|ran] {to}.
{kin} made a [yummy|sweet|good|nice] [lunch|supper|breakfast] of {food} and {food}.
The [sun|moon|sky] was bright over the [roof|river|{look} house] [all day|that evening].
{S} made a {nice} [bed|nest|home] for a {look} {an}.
{S} found a {nice} {bit} under the {look} [rock|stairs|leaves|log].
{S} got a [prize|medal|treat] for [drawing|finding|feeding] [a {look} {an}|{few}].
{kin} told {o} a [joke|funny story] about {few}.
{kin} laughed when the {pet} [licked|chased|ate] {his} [boots|shoes|toast|gloves].
{S} laughed and [rolled|ran|slid] down the [path|road|stairs] with {kin}.
{S} shared some {food} with [a {look} {an}|{few}] and {kin}.
{S} was [pleased|amused|thrilled|excited] to [see|meet|find] {few} {at}.
[Some|Two|Three] {ans} played [by|near|around] the {it} [all morning|until noon|with {kin}].
{S} [thanked|hugged|kissed] {kin} and [ran|skipped|hurried|went] [home|outside|{to}] with the {it}.
{kin} promised to [bring|send|find] {o} [some {food}|a {look} {an}] [soon|that night].
{S} [hoped|was eager] to [see|meet|find|feed] the {pet} [again soon|by the gate|with {kin}].
It was a [nice|good|fine|sunny|grand] day to [sit|read|walk|fish|sing] {at}.
{S} [enjoyed|liked] the smell of [rain|grass|{food}|flowers] {at}.
{kin} was kind and [carried|washed|fixed|painted] the {it} [for {o}|{at}].
The {pet} was [safe|happy|calm|free] and slept [on|beside] [the {it}|{kin}|a {look} {bit}].
{S} danced [with|around] {kin} to a [jolly|merry|lively|happy] song.
{S} made a wish under [the moon|a {look} tree] with {kin}.
{S} had a dream about {few} and {food}.
{kin} agreed to [build|paint|draw] a {look} [tower|castle|bridge|{an}] [with {o}|{at}].
{S} rescued a [tiny|wet|small|thin] {an} from [the mud|{kin}|a {look} ditch|{few}].
{S} ran to help {kin} [carry|find|cook|wash] [some {food}|the {ans}|the {look} {an}].
Everyone [cheered|laughed|smiled] when {s} [carried|brought] the {it} {to}.
{kin} said that {s} was [brave|clever|wise|strong|honest] and [brought {food}|fed the {ans}].
There was a party {at} [for {kin}|with {food}|for {few}].
{S} wore a {nice} {look} [cap|crown|shirt|sweater] {to}.
{S} gave the {pet} a treat of {food} and [{food}|milk]. {S} smiled as {few} ate the {food}.
The {pet} gently [touched|pushed|licked] the {it} with its {look} [nose|foot|ear].
{S} proudly [showed|brought|carried] the {it} to [the class|{kin}|the whole town|the {look} {an}].
{S} [gladly|kindly] gave [half|most|some] of the {food} to [{kin}|the {ans}|a {look} {an}].
The [children|{ans}] sang [merrily|sweetly|happily] [in the trees|all evening|around {kin}|{at}].
{S} [bravely|cheerfully|calmly] [climbed|jumped] over the {look} [wall|fence|log] with {kin}.
{kin} put a [gift|surprise|treat] for {o} [behind|under|near] the [sofa|stove|{look} {bit}].
{S} and {kin} saw a {kind} {an} {at}.
With care {s} [fixed|painted|washed] the {look} [gate|roof|wheel|barrel] [before noon|with {kin}].
{S} felt [safe|relaxed|hopeful] beside {kin} [near the {look} stove|and the {look} {an}].
By luck {s} [met|saw|found] [{kin}|{few}] {at}.
{S} drew a {kind} {an} [near|beside|behind] a {look} {bit}.
{S} said the {food} tasted [good|sweet|delicious|nice] with [butter|milk|{food}|{food}].
{S} had a [clever|good|neat] idea [about the {it}|and told {kin}|and painted the {it}].
{kin} smiled and [passed|brought|gave|cooked] {o} some {food} and {food}.
{S} became friends with [a {look} {an}|{few}|{few}] {at}.
It was fun to [chase|count|feed|watch|draw] {ans} {at}.
{S} won the race by [running|hopping|swimming] past [{kin}|{few}|a {look} {an}].
{S} learned a {nice} [dance|song|game|word] from [{kin}|the {look} {an}].
{S} played [chess|cards|football] with {kin} and [the {look} {an}|{few}].
{S} cared for [a {look} {an}|{few}] [all winter|all week|that spring|{at}].
The {pet} trusted {kin} and ate [some {food}|the {look} {bit}|near {ans}].
{S} [chuckled|giggled] as a {look} {an} [sniffed|licked|pulled] [{his} shoes|{kin}|the {it}].
{S} had an adventure with {few} {at}.
{S} wrote a {nice} [letter|poem|card] [about|to] [{kin}|the {ans}|{few}].
{kin} [welcomed|greeted] {o} with {food} and {food}.
The [children|class] [cheered|praised|admired] the {it} and [{kin}|the {ans}] [{at}|again].
{S} was [glad|grateful|happy|thankful] for the [rain|snow|wind|{food}|{ans}] {at}.
{S} saved some {food} for a [hungry|thin|small|wet] {an}.
At [dawn|noon|dusk] the [town|road|river|path] was [peaceful|calm|sunny] and [white|cold|brown].
{S} ate a [good|nice|healthy] [supper|lunch|breakfast] of {food} with [{kin}|the {ans}].
{S} and {kin} shared a {look} [plate|bowl] of {food}.
{S} sat in the sunshine with [a {look} {an}|{kin}|{few}] [and slept|until noon|and {food}].
The {it} was a perfect [bed|nest|house|seat] for [a {look} {an}|{few}|{few}].
{kin} was proud that {s} could [swim|read|skate|dance|cook {food}|draw {ans}].
{S} thought the {it} looked {nice} [in the {look} snow|near the {look} {bit}].
There was laughter {at} [all evening|after school|when {kin} danced].
{S} [watched|heard|fed|chased] the {ans} and felt [calm|happy|relaxed|glad|free] {at}.
{kin} showed {o} a [good|clever|neat] way to cook {food}.
{S} planted [seeds|beans|corn] in a sunny [corner|spot] [with {kin}|{at}].
A [wise|jolly|kind|funny] old [sailor|king|nurse|painter] [waved at|sang to|met] {kin} {at}.
The [queen|king|painter] gave {o} a [medal|prize|jewel|gift] for the {it}[| and {food}].
{S} sent {kin} a [kiss|hug|smile|surprise] [from the {look} bus|from the {look} house|and {food}].
Inside the {look} [barrel|tower|house] {s} found a [treasure|jewel|gift|surprise].
{S} rode a {kind} {look} [horse|camel|donkey|cow|bear|goat] {to}.
The water was [cool|nice|calm|warm] and {s} swam [all day|past {kin}|to the {look} rock|with {ans}].
{kin} and the {pet} [ran|hurried|went] home with a {nice} {bit}.
{S} [took|brought|gave] {kin} a {nice} {bit} from the [path|river|tree|{look} house].
A {kind} {an} [slept|sat|stood|waited] [beside|behind|near] the {it} {at}.
Then {few} and a {kind} {an} [crossed the road|came in|ate grass|looked up].
The {it} was a [gift|treat|surprise] for [{kin}|{few}|{kin} and the {ans}].
{S} [heard|read|told] a {nice} [story|song] about {kin} and {few}.
{kin} [kissed|hugged|thanked] the {pet} and gave it some {food}.
Later a {kind} {an} [brought|showed|passed] {o} [a {look} {bit}|some {food}].
{S} [lifted|held|carried] the {look} {an} with care [past {kin}|{to}].
{S} was [lucky|glad|happy|eager] to [find|eat|cook|carry] {food} and {food}.
{kin} [cooked|bought|found] some [good|nice|sweet] {food} for {few}.
In the sunshine {s} [washed|brushed|fed|counted] {few} [with {kin}|{at}].
{S} and the {pet} became friends [{at}|after lunch|that day].
{kin} [drew|painted|wrote] a funny [letter|song|poem] about the {it}.
{kin} [said|thought] the {pet} was [clever|cute|funny|strong|lively] and [wet|big|tiny|old].
{S} [jumped|sang|skipped] [merrily|happily|proudly] past {few} and {kin}.
{S} [liked|enjoyed] the [snow|rain|water|grass] [near|under|behind] the {look} [tree|bridge|house].
The prize went to {kin} and [a {look} {an}|{few}].
{S} hurried {to} to [help|thank] {kin}.
{kin} had a {nice} {look} [chair|house|cart|bed|bus] {at}.
In a dream {s} [met|saw|chased] {few} and {kin}.
{S} hoped {kin} could [bring|find|draw|buy] [some {food}|{few}|a {look} {bit}].
{kin} [wore|found|bought|made] a {nice} {look} [cap|shirt|sweater|ribbon] {at}.
The {look} [house|tower|bus|cart] {at} looked [grand|peaceful|lovely|pretty|special].
{S} [climbed|walked|skipped] [gladly|calmly|proudly] up the {look} [tower|stairs|path] with {kin}.
The {ans} [gladly|happily|gently] ate the {look} [grass|leaves|corn] {at}.
{S} and {kin} [giggled|chuckled] at the {look} {an} [again|that day].
{S} rolled the {it} [gently|proudly|happily] past [{few}|{kin}|{few}].
{S} smiled when {kin} [found|fed|chased|counted|drew] {few} {at}.
{S} put {food} and {food} on a {nice} {look} plate.
{S} filled a {nice} bowl with {food} for [{kin}|{few}].
{S} told the {pet} a joke about [{kin}|{few}].
At [dawn|noon|dusk] {kin} [came|ran|walked] up with a {nice} {look} {bit}.
{S} saw {kin} [dance|swim|skate] and [cheered|laughed|giggled|smiled] {at}.
{S} kept the {look} {bit} safe [under|behind|near] the {look} [bed|rock|chair].
{S} had a hug for {kin} and [the {look} {an}|{few}].
{S} was proud of the {it} and [showed {kin}|drew {few}|ate {food}].
{S} [swam|walked|hopped|ran] home with a {kind} {an} and {kin}.
A {look} [bus|cart] brought {kin} and a {nice} [letter|chair|plate|{an}].
{S} [built|painted|fixed] a {nice} {look} [wall|tower|cart|fence] {at}.
{S} tied a {nice} {look} [string|ribbon|cloth] [around|to|on] the {it}.
"""


def split_templates(block: str) -> list[str]:
    """One template for each sentence of the block."""
    return [template.strip() for template in re.split(r"\.\s", block) if template.strip()]


TEMPLATES = {
    "plain": split_templates(PLAIN),
    "sad": split_templates(SAD),
    "happy": split_templates(HAPPY),
}
OPENING_TEMPLATES = split_templates(OPENINGS)
MOODS, SHARES = ("plain", "sad", "happy"), (0.45, 0.25, 0.30)
KEEP_MOOD = 0.1  # chance that a sentence takes the mood of the one before
END = 0.22  # chance that the story ends after a sentence
MOST_SENTENCES, MOST_WORDS, MOST_TOKENS = 6, 10, 60  # in a story, in a sentence, in a story


def is_held_out(name: str, thing: str) -> bool:
    """Whether this hero never owns this thing in the training text (one pair in twelve)."""
    return (NAMES.index(name) + 5 * THINGS.index(thing)) % 12 == 0


PAIRS = {
    held_out: [
        (name, thing) for name in NAMES for thing in THINGS if is_held_out(name, thing) == held_out
    ]
    for held_out in (False, True)
}


def new_state(rng: random.Random, held_out: bool = False) -> dict:
    """Hero and thing of one story; the other characters and the place join when first named."""
    name, thing = rng.choice(PAIRS[held_out])
    s, o, his = ("he", "him", "his") if name in BOYS else ("she", "her", "her")
    full = f"{rng.choice(LOOKS)} {thing}"
    return {"name": name, "thing": thing, "full": full, "s": s, "o": o, "his": his}


def fill(slot: str, state: dict, rng: random.Random) -> str:
    """The words for one slot; the state remembers `kin`, the place and the last animal."""
    lists = {"look": LOOKS, "bit": BITS, "kind": KIND, "nice": NICE}
    if slot in lists:
        return rng.choice(lists[slot])
    if slot == "food":
        return (rng.choice(DISHES) + " " if rng.random() < 0.2 else "") + rng.choice(FOODS)
    if slot in ("ans", "few"):
        return (rng.choice(NUMBERS) + " " if slot == "few" else "") + rng.choice(ANIMALS) + "s"
    if slot == "an":
        state["pet"] = rng.choice(ANIMALS)
        return state["pet"]
    if slot == "S":
        return state["name"] if rng.random() < 0.45 else state["s"]
    if slot == "it":
        return state["full" if rng.random() < 0.25 else "thing"]
    if slot == "kin":
        state.setdefault("kin", rng.choice(KIN).format(his=state["his"]))
    if slot == "to" or (slot == "at" and "place" not in state):
        state["place"] = rng.choice([place for place in PLACES if place != state.get("place")])
    if slot in ("at", "to"):
        where, place = state["place"].split()
        return f"{where if slot == 'at' else 'to'} the {place}"
    return state[slot]


def realise(template: str, state: dict, rng: random.Random) -> str:
    """A finished sentence from a template; sometimes a short one begins with a time."""
    text = re.sub(r"\[([^]]*)\]", lambda match: rng.choice(match[1].split("|")), template)
    text = re.sub(r"\{(\w+)\}", lambda match: fill(match[1], state, rng), text)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    if template.startswith("{S}") and len(text.split()) < 8 and rng.random() < 0.12:
        text = f"{rng.choice(WHEN)} {text}"
    return text[0].upper() + text[1:] + "."


def opening(rng: random.Random, held_out: bool = False) -> tuple[str, dict]:
    """An opening sentence and the state it sets; `held_out` takes a pair unseen in training."""
    state = new_state(rng, held_out)
    return realise(rng.choice(OPENING_TEMPLATES), state, rng), state


def next_sentence(mood: str, state: dict, used: set, rng: random.Random) -> str:
    """A sentence of this mood that is not too long, from a template the story has not used."""
    while True:
        template = rng.choice(TEMPLATES[mood])
        if template in used or ("{pet}" in template and "pet" not in state):
            continue
        after = dict(state)
        sentence = realise(template, after, rng)
        if len(sentence.split()) <= MOST_WORDS:
            state.update(after)
            used.add(template)
            return sentence


def story(rng: random.Random, held_out: bool = False) -> list[str]:
    """The sentences of one story: an opening and one to six more, no template twice."""
    first, state = opening(rng, held_out)
    sentences, used, mood = [first], set(), None
    while len(sentences) <= MOST_SENTENCES:
        if mood is None or rng.random() >= KEEP_MOOD:
            mood = rng.choices(MOODS, SHARES)[0]
        sentences.append(next_sentence(mood, state, used, rng))
        length = sum(len(sentence.split()) + 1 for sentence in sentences)
        if rng.random() < END or length + MOST_WORDS + 1 > MOST_TOKENS:
            break
    return sentences
