//! Needle tasks: sentences that state facts, scattered over a long text, and questions about them.
//!
//! The wording is that on which the built-in model was trained (`demo-model/README.md`); any model that reads English can
//! be asked the same.

use std::fmt::Write;

use ops::Random;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// Facts among sentences that mention neither names nor numbers
    Easy,
    /// The same, and sentences that mention names and numbers without stating a fact
    Hard,
    /// As hard, with up to a hundred facts
    Many,
    /// The key of the teacher of somebody: two facts for one answer
    Hop,
    /// The key of somebody who has none
    Unknown,
}

impl Task {
    /// All of them.
    pub const ALL: [Task; 5] = [Task::Easy, Task::Hard, Task::Many, Task::Hop, Task::Unknown];

    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Task::Easy => "easy",
            Task::Hard => "hard",
            Task::Many => "many",
            Task::Hop => "hop",
            Task::Unknown => "unknown",
        }
    }
}

/// A long text with questions about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Context {
    /// The text, without a question.
    pub text: String,
    /// What can be asked.
    pub questions: Vec<Question>,
}

/// A question.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Follows the text after a line break.
    pub text: String,
    /// What the model must say, blanks at both ends aside.
    pub answer: String,
    /// Where the fact lies: 0 at the beginning, 1 at the end.
    pub depth: f64,
}

const SYLLABLES: [&[&str]; 2] = [
    &["Ba", "Do", "Fe", "Gu", "Ka", "Lo", "Mi", "Ne", "Pa", "Ru", "Si", "To", "Va", "Ze"],
    &["rin", "mo", "la", "vek", "dus", "ni", "kal", "sto", "bra"],
];
const ADJECTIVES: &[&str] = &[
    "quiet", "old", "green", "small", "heavy", "bright", "cold", "tall", "gentle", "narrow", "warm", "red",
    "dark", "young", "wide", "silver", "plain", "empty", "golden", "broken",
];
const NOUNS: &[&str] = &[
    "river", "stone", "garden", "market", "teacher", "sailor", "window", "bridge", "forest", "table",
    "farmer", "lamp", "road", "horse", "letter", "harbor", "winter", "baker", "mountain", "kitchen", "clock",
    "village", "boat", "painter", "doctor", "cloud", "field", "tower", "song", "hill", "door", "wheel",
    "tree", "house", "bird",
];
const VERBS: &[&str] = &[
    "watched",
    "crossed",
    "found",
    "painted",
    "carried",
    "opened",
    "followed",
    "remembered",
    "visited",
    "described",
    "left",
    "cleaned",
    "moved",
    "passed",
    "repaired",
];
const PREPOSITIONS: &[&str] = &["near", "behind", "under", "beside", "above", "beyond"];
const ADVERBS: &[&str] = &["slowly", "often", "never", "again", "today", "once"];
/// Capital letters are slots.
const SENTENCES: &[&str] = &[
    "the A N V the N P the A N.",
    "the N V the A N.",
    "a A N was P the N.",
    "every N V the N R.",
    "the A N and the N V the N.",
    "the N of the N was A.",
    "R the N V a A N.",
    "the N was A and A.",
    "a A N V the N with the A N.",
    "the A N R V the N in the N.",
];

/// Sentences that are facts, beside those that are asked about.
const FACTS_MIN: usize = 24;
/// Share of sentences that mention names or numbers, where there are such.
const DISTRACTORS: f64 = 0.15;

fn one<'a>(list: &[&'a str], random: &mut Random) -> &'a str {
    list[random.below(list.len())]
}

fn names() -> Vec<String> {
    let [first, second] = SYLLABLES;
    first.iter().flat_map(|a| second.iter().map(move |b| format!("{a}{b}"))).collect()
}

fn shuffle<T>(items: &mut [T], random: &mut Random) {
    for i in (1..items.len()).rev() {
        items.swap(i, random.below(i + 1));
    }
}

fn number(random: &mut Random) -> String {
    format!("{:06}", random.below(1_000_000))
}

fn filler(random: &mut Random) -> String {
    let mut sentence = String::new();
    for word in one(SENTENCES, random).split(' ') {
        let (slot, end) = word.strip_suffix('.').map_or((word, ""), |slot| (slot, "."));
        let word = match slot {
            "A" => one(ADJECTIVES, random),
            "N" => one(NOUNS, random),
            "V" => one(VERBS, random),
            "P" => one(PREPOSITIONS, random),
            "R" => one(ADVERBS, random),
            word => word,
        };
        let space = if sentence.is_empty() { "" } else { " " };
        // Writing to a string cannot fail.
        let _ = write!(sentence, "{space}{word}{end}");
    }
    capitalise(&sentence)
}

fn capitalise(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

/// Mentions a name or a number, and states no fact.
fn distractor(names: &[String], random: &mut Random) -> String {
    let name = &names[random.below(names.len())];
    match random.below(2) {
        0 => format!("{name} {} the {}.", one(VERBS, random), one(NOUNS, random)),
        _ => {
            let filler = filler(random);
            format!("{} is {}.", filler.trim_end_matches('.'), number(random))
        }
    }
}

/// A text of about `tokens` tokens, as `count` counts them, and `num_questions` questions about facts at all depths.
pub fn context(
    task: Task,
    tokens: usize,
    num_questions: usize,
    random: &mut Random,
    count: &dyn Fn(&str) -> usize,
) -> Context {
    let mut names = names();
    shuffle(&mut names, random);
    let wanted = if task == Task::Many { tokens / 24 } else { FACTS_MIN.max(num_questions) };
    let num_facts = wanted.clamp(1, 100).min(names.len() - num_questions.min(names.len() / 3) - 1);
    let attribute = if random.unit() < 0.7 { "key" } else { one(&["code", "pin", "tag"], random) };
    let (known, others) = names.split_at(num_facts);
    let facts: Vec<(&String, String)> = known.iter().map(|name| (name, number(random))).collect();
    let mut needles: Vec<(String, Option<Needle>)> = facts
        .iter()
        .enumerate()
        .map(|(i, (name, value))| (format!("The {attribute} of {name} is {value}."), Some(Needle::Fact(i))))
        .collect();
    let pupils = if task == Task::Hop { &others[..num_questions.min(others.len())] } else { &[] };
    let teachers: Vec<usize> = pupils.iter().map(|_| random.below(num_facts)).collect();
    for (i, (pupil, &teacher)) in pupils.iter().zip(&teachers).enumerate() {
        needles.push((format!("The teacher of {pupil} is {}.", facts[teacher].0), Some(Needle::Link(i))));
    }
    shuffle(&mut needles, random);

    let mut left = tokens.saturating_sub(needles.iter().map(|(text, _)| count(text) + 1).sum());
    let mut sentences = Vec::new();
    while left > 0 {
        let mentions = task != Task::Easy && random.unit() < DISTRACTORS;
        let sentence = if mentions { distractor(&names, random) } else { filler(random) };
        left = left.saturating_sub(count(&sentence) + 1);
        sentences.push((sentence, None));
    }
    for needle in needles {
        let at = random.below(sentences.len() + 1);
        sentences.insert(at, needle);
    }
    let num_sentences = sentences.len() as f64;
    let place = |wanted: Needle| {
        let at = sentences.iter().position(|(_, needle)| *needle == Some(wanted));
        at.map_or(0.0, |at| at as f64 / num_sentences)
    };
    let mut questions: Vec<Question> = match task {
        Task::Easy | Task::Hard | Task::Many => (facts.iter().enumerate())
            .map(|(i, (name, value))| Question {
                text: format!("What is the {attribute} of {name}?"),
                answer: format!("{value}."),
                depth: place(Needle::Fact(i)),
            })
            .collect(),
        Task::Hop => (pupils.iter().zip(&teachers).enumerate())
            .map(|(i, (pupil, &teacher))| Question {
                text: format!("What is the {attribute} of the teacher of {pupil}?"),
                answer: format!("{} {}.", facts[teacher].0, facts[teacher].1),
                depth: place(Needle::Link(i)),
            })
            .collect(),
        Task::Unknown => (others.iter())
            .map(|name| Question {
                text: format!("What is the {attribute} of {name}?"),
                answer: "unknown.".into(),
                depth: 0.0,
            })
            .collect(),
    };
    // Those asked lie at all depths.
    questions.sort_by(|a, b| a.depth.total_cmp(&b.depth));
    let num_asked = num_questions.min(questions.len());
    let asked = (0..num_asked).map(|i| i * (questions.len() - 1) / (num_asked.max(2) - 1));
    let questions = asked.map(|i| questions[i].clone()).collect();
    let text = sentences.iter().map(|(text, _)| text.as_str()).collect::<Vec<_>>().join(" ");
    Context { text, questions }
}

/// What a sentence states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needle {
    /// A number.
    Fact(usize),
    /// A teacher.
    Link(usize),
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 5;

    #[test]
    fn answers_are_in_the_text_once() {
        for task in Task::ALL {
            let words = |text: &str| text.split(' ').count();
            let made = context(task, 3000, 10, &mut Random::new(SEED), &words);
            let again = context(task, 3000, 10, &mut Random::new(SEED), &words);
            assert_eq!(made, again, "seed {SEED} {task:?}");
            assert_eq!(made.questions.len(), 10, "seed {SEED} {task:?}");
            assert!((2000..3200).contains(&words(&made.text)), "seed {SEED} {task:?}");
            for question in &made.questions {
                let subject = question.text.trim_end_matches('?').rsplit(' ').next().expect("a name");
                let stated = made.text.matches(&format!("of {subject} is ")).count();
                match task {
                    Task::Unknown => assert_eq!(stated, 0, "seed {SEED} {question:?}"),
                    Task::Hop => {
                        let (teacher, number) = question.answer.split_once(' ').expect("two words");
                        assert!(made.text.contains(&format!("The teacher of {subject} is {teacher}.")));
                        assert!(made.text.contains(&format!("of {teacher} is {number}")), "{question:?}");
                    }
                    _ => {
                        assert_eq!(stated, 1, "seed {SEED} {question:?}");
                        assert!(made.text.contains(&format!("of {subject} is {}", question.answer)));
                    }
                }
            }
            if task != Task::Unknown {
                let depths: Vec<f64> = made.questions.iter().map(|q| q.depth).collect();
                assert!(depths[0] < 0.3 && depths[9] > 0.7, "seed {SEED} {task:?} {depths:?}");
            }
        }
    }
}
