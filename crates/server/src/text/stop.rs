//! Stop strings across token borders.

/// Watches a stream of text for stop strings and holds back what may be the beginning of one.
///
/// The stop string whose end comes first wins, then the longest; so the result does not depend on how the text is cut
/// into pieces.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    include: bool,
    held: String,
}

/// What a piece of text revealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revealed {
    /// Text that may be shown.
    pub text: String,
    /// Index of the stop string that ended the text.
    pub stop: Option<usize>,
}

impl StopMatcher {
    /// Watches for `stops`, none of them empty; `include` shows the stop string that was found.
    pub fn new(stops: Vec<String>, include: bool) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        StopMatcher { stops, include, held: String::new() }
    }

    /// The stop string at `index`.
    pub fn stop(&self, index: usize) -> &str {
        &self.stops[index]
    }

    /// Takes the next piece of text. After a stop string was found nothing may be pushed any more.
    pub fn push(&mut self, piece: &str) -> Revealed {
        self.held.push_str(piece);
        let found = self.stops.iter().enumerate().filter_map(|(index, stop)| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, index))
        });
        if let Some((end, start, index)) = found.min() {
            self.held.truncate(if self.include { end } else { start });
            return Revealed { text: std::mem::take(&mut self.held), stop: Some(index) };
        }
        let undecided = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - undecided);
        Revealed { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// What was held back, once it is clear that no stop string follows.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length in bytes of the longest end of `text` that is the beginning of `stop`, but not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(length, _)| length)
        .rev()
        .find(|&length| text.as_bytes().ends_with(&stop.as_bytes()[..length]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::tests::fixed_seed;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect(), include);
        let mut shown = String::new();
        for piece in pieces {
            let revealed = matcher.push(piece);
            shown += &revealed.text;
            if revealed.stop.is_some() {
                return (shown, revealed.stop);
            }
        }
        (shown + &matcher.finish(), None)
    }

    #[test]
    fn a_stop_over_three_pieces_is_not_shown() {
        assert_eq!(run(&["\n\nUser:"], false, &["hi\n", "\nUs", "er: more"]), ("hi".into(), Some(0)));
        assert_eq!(run(&["\n\nUser:"], true, &["hi\n", "\nUs", "er: more"]), ("hi\n\nUser:".into(), Some(0)));
        assert_eq!(run(&["\n\nUser:"], false, &["hi\n", "\nUs", "a"]), ("hi\n\nUsa".into(), None));
    }

    #[test]
    fn nothing_is_held_back_that_cannot_be_a_stop() {
        let mut matcher = StopMatcher::new(vec!["ab".into()], false);
        assert_eq!(matcher.push("xa").text, "x");
        assert_eq!(matcher.push("a").text, "a");
        assert_eq!(matcher.finish(), "a");
    }

    #[test]
    fn the_first_to_end_wins() {
        assert_eq!(run(&["bcd", "c"], false, &["abcd"]), ("ab".into(), Some(1)));
        assert_eq!(run(&["c", "bc"], false, &["abcd"]), ("a".into(), Some(1)));
        assert_eq!(run(&["é!"], false, &["caf", "é", "!"]), ("caf".into(), Some(0)));
    }

    proptest! {
        #![proptest_config(fixed_seed(256))]

        #[test]
        fn cutting_changes_nothing(
            text in "[abé]{0,24}",
            stops in proptest::collection::vec("[abé]{1,4}", 0..4),
            include in any::<bool>(),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let characters: Vec<String> = text.chars().map(String::from).collect();
            let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops, include, &[&text]), run(&stops, include, &characters));
        }
    }
}
