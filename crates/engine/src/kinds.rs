//! Which answers may go on from each other's KV.
//!
//! KV of a sparse answer follows from its tokens, from how they attended, and from where its prompt ended. Who takes it over has a
//! longer prompt, so that it accepts what others selected where it would attend to everything is the very thing that it asks for:
//! the length of the prompt cannot be part of the key. What is: the method with all its options, and the budget *as it was asked for*.
//! In tokens, a share of the prompt would be another budget in every turn of a chat.

use ops::sparse::Method;
use sparse::Budget;

/// Kinds that are known at a time. Requests choose options freely, so there may be any number over time.
const KINDS_MAX: usize = 256;

/// What answers have in common that may go on from each other's KV.
type Kind = (Method, Budget);

/// Kinds by number. One that nobody asks for any more is forgotten, and gets a new number when it comes back: blocks with the old
/// one are found no more, and evicted in their time.
pub(crate) struct Kinds {
    /// The last one asked for comes last.
    known: Vec<(Kind, u64)>,
    num_seen: u64,
}

impl Kinds {
    pub(crate) fn new() -> Self {
        Kinds { known: Vec::with_capacity(KINDS_MAX), num_seen: 0 }
    }

    /// The number of a kind.
    pub(crate) fn number(&mut self, method: Method, budget: Budget) -> u64 {
        let kind = (method, budget);
        let entry = match self.known.iter().position(|(known, _)| *known == kind) {
            Some(at) => self.known.remove(at),
            None => {
                if self.known.len() == KINDS_MAX {
                    self.known.remove(0);
                }
                self.num_seen += 1;
                (kind, self.num_seen)
            }
        };
        self.known.push(entry);
        entry.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::support::sparse;

    #[test]
    fn a_kind_is_a_method_and_a_budget_as_asked_for() {
        let mut kinds = Kinds::new();
        let (two, four) = (sparse(2, 0).method, sparse(4, 0).method);
        let (tokens, share) = (Budget::Tokens(12), Budget::Share(0.125));
        let first = kinds.number(two, tokens);
        assert_ne!(kinds.number(four, tokens), first);
        assert_ne!(kinds.number(two, share), first);
        assert_eq!(kinds.number(two, tokens), first);
        for i in 0..KINDS_MAX as u32 - 1 {
            kinds.number(four, Budget::Tokens(1000 + i));
        }
        assert_eq!(kinds.known.len(), KINDS_MAX);
        assert_eq!(kinds.number(two, tokens), first, "it was asked for last");
        for i in 0..KINDS_MAX as u32 {
            kinds.number(four, Budget::Tokens(5000 + i));
        }
        assert!(kinds.number(two, tokens) > first, "a number is never given twice");
    }
}
