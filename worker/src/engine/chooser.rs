//! The logits of a step to the next token of each of its sequences, and to the log-probabilities
//! that were asked for. Between the sampler, which knows one row, and the lead, which knows
//! streams.

use super::Error;
use super::output::TokenOut;
use super::rank::Rank;
use super::sampler::{self, LogSoftmax, MAX_LOGPROBS, Row, Scratch};
use super::scheduler::Scheduler;
use super::sequence::Sequence;
use super::step::{Entry, StepPlan};

/// Working memory, and the answer for one step.
#[derive(Debug, Default)]
pub struct Chooser {
    /// By entry of the plan: the token that follows, if the step reached the end of what is known.
    pub tokens: Vec<Option<u32>>,
    /// By entry of the plan.
    pub choices: Vec<Choice>,
    scratch: Scratch,
}

/// What to tell about one entry.
#[derive(Debug, Default)]
pub struct Choice {
    pub token: Option<TokenOut>,
    /// Of the positions that follow the entry's rows, where these are prompt.
    pub prompt_tokens: Vec<TokenOut>,
}

impl Chooser {
    /// Chooses for every entry of the plan in flight.
    ///
    /// # Errors
    /// Logits that are no numbers: the epoch is over.
    pub fn choose(
        &mut self,
        rank: &mut Rank,
        scheduler: &Scheduler,
        plan: &StepPlan,
    ) -> Result<(), Error> {
        self.tokens.clear();
        self.choices.clear();
        let mut row_idx = 0;
        for (entry_idx, entry) in plan.entries.iter().enumerate() {
            let sequence = scheduler.scheduled(entry_idx);
            let choice = match plan.whole_logits {
                true => self.choose_entry(rank, sequence, entry, row_idx)?,
                false => likeliest(rank, entry, row_idx)?,
            };
            row_idx += entry.n_sampled as usize;
            self.tokens.push(choice.token.as_ref().map(|token| token.id));
            self.choices.push(choice);
        }
        Ok(())
    }

    fn choose_entry(
        &mut self,
        rank: &mut Rank,
        sequence: &Sequence,
        entry: &Entry,
        first_row_idx: usize,
    ) -> Result<Choice, Error> {
        let mut choice = Choice::default();
        let end = entry.start + entry.n_tokens;
        for i in 0..entry.n_sampled {
            let row = rank.row(first_row_idx + i as usize)?;
            // The row of position p speaks of the token at p + 1.
            let position = end - entry.n_sampled + i + 1;
            match sequence.tokens.get(position as usize) {
                Some(&known) => {
                    choice.prompt_tokens.push(self.token_out(row, known, sequence, true));
                }
                None => {
                    let (sampling, scratch) = (&sequence.sampling, &mut self.scratch);
                    let token = sampler::sample(&row, sampling, position, scratch);
                    choice.token = Some(self.token_out(row, token, sequence, false));
                }
            }
        }
        Ok(choice)
    }

    fn token_out(
        &mut self,
        row: Row<'_>,
        id: u32,
        sequence: &Sequence,
        is_prompt: bool,
    ) -> TokenOut {
        let n_top = match sequence.sampling.n_logprobs {
            Some(n) => n.min(MAX_LOGPROBS) as usize,
            None if is_prompt => 0,
            None => return TokenOut { id, logprob: None, top: Vec::new() },
        };
        let row = LogSoftmax::new(row);
        TokenOut { id, logprob: Some(row.of(id)), top: row.top(n_top, &mut self.scratch) }
    }
}

/// An entry whose sequence takes the likeliest token and wants to know no more.
fn likeliest(rank: &Rank, entry: &Entry, row_idx: usize) -> Result<Choice, Error> {
    if entry.n_sampled == 0 {
        return Ok(Choice::default());
    }
    let id = rank.likeliest(row_idx)?;
    let token = Some(TokenOut { id, logprob: None, top: Vec::new() });
    Ok(Choice { token, prompt_tokens: Vec::new() })
}
