//! What of a program need not be done, or not apart (pure): sums of one part, which are the part, or are
//! added where they belong; and activations that only the next product reads, which are made as it
//! takes them.

use crate::model::program::{BufferId, Op, Program};

/// Where each buffer lies: the one part of a sum in the sum itself, if it is added as soon as it is
/// made.
pub(super) fn places(program: &Program) -> Vec<usize> {
    let mut places: Vec<usize> = (0..program.buffers.len()).collect();
    for two in program.ops.windows(2) {
        let [Op::LinearParts { out: made, .. }, Op::AllReduce { parts, out, .. }] = two else {
            continue;
        };
        let is_one = program.buffers[parts.0].n_parts == 1;
        if is_one
            && made == parts
            && program.buffers[parts.0].columns == program.buffers[out.0].columns
        {
            places[parts.0] = out.0;
        }
    }
    places
}

/// By op, where one part is all of a sum that the next norm adds to the residual: that residual. A rank
/// alone may add the product to it at once, and then there is no sum, and nothing for the norm to add.
pub(super) fn residuals(program: &Program) -> Vec<Option<BufferId>> {
    let of = |(at, op): (usize, &Op)| {
        let Op::LinearParts { out: made, .. } = op else { return None };
        let [Op::AllReduce { parts, out, .. }, norm, rest @ ..] = program.ops.get(at + 1..)? else {
            return None;
        };
        let Op::Norm { residual, delta: Some(delta), .. } = norm else { return None };
        let [part, sum, to] = [parts, out, residual].map(|id| &program.buffers[id.0]);
        let is_one = part.n_parts == 1 && part.columns == sum.columns && sum.columns == to.columns;
        let mut until_made_again = rest
            .iter()
            .take_while(|op| !matches!(op, Op::AllReduce { out: made, .. } if made == out));
        let is_alone = !until_made_again.any(|op| reads(op, *out));
        (is_one && made == parts && delta == out && is_alone).then_some(*residual)
    };
    program.ops.iter().enumerate().map(of).collect()
}

fn reads(op: &Op, id: BufferId) -> bool {
    match op {
        Op::Embed { .. } => false,
        Op::Norm { residual, delta, .. } => *residual == id || *delta == Some(id),
        Op::Linear { input, .. } | Op::LinearParts { input, .. } | Op::Head { input, .. } => {
            *input == id
        }
        Op::RopeKv { q, k, v, .. } => [q, k, v].contains(&&id),
        Op::Attention { q, .. } => *q == id,
        Op::SiluGate { gate, up, .. } => *gate == id || *up == id,
        Op::Route { logits, .. } => *logits == id,
        Op::Experts { input, routes, .. } => *input == id || *routes == id,
        Op::Combine { outputs, routes, .. } => *outputs == id || *routes == id,
        Op::AllReduce { parts, .. } => *parts == id,
    }
}

/// By op that makes activations: the linear op right behind it, if it alone reads them.
pub(super) fn feeds(program: &Program) -> Vec<Option<usize>> {
    let makes = |op: &Op| match op {
        Op::Norm { out, .. } | Op::Attention { out, .. } | Op::SiluGate { out, .. } => Some(*out),
        _ => None,
    };
    let feeds = |(at, op): (usize, &Op)| {
        let made = makes(op)?;
        let mut after = program.ops[at + 1..].iter();
        let next = after.next()?;
        let is_linear = matches!(next, Op::Linear { .. } | Op::LinearParts { .. });
        let mut until_made_again = after.take_while(|op| makes(op) != Some(made));
        let is_alone = !until_made_again.any(|op| reads(op, made));
        (is_linear && reads(next, made) && is_alone).then_some(at + 1)
    };
    program.ops.iter().enumerate().map(feeds).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::model::{families, shard};

    fn program(shares: &[u32]) -> Program {
        let checkpoint = Checkpoint::open("synthetic:llama-tiny:q4_0".as_ref());
        let config = checkpoint.unwrap_or_else(|error| panic!("{error}")).config;
        let split = shard::split(&config, shares).unwrap_or_else(|error| panic!("{error}"));
        families::compile(&config, &split, 0)
    }

    #[test]
    fn norms_gates_and_attention_feed_the_product_behind_them_but_not_the_head() {
        let program = program(&[1]);
        for (at, (op, fed)) in program.ops.iter().zip(feeds(&program)).enumerate() {
            let is_last = matches!(program.ops.get(at + 1), Some(Op::Head { .. }));
            let makes = matches!(op, Op::Norm { .. } | Op::Attention { .. } | Op::SiluGate { .. });
            assert_eq!(fed, (makes && !is_last).then_some(at + 1), "op {at}: {op:?}");
        }
    }

    #[test]
    fn what_somebody_else_reads_feeds_nobody() {
        let mut program = program(&[1]);
        let at = program.ops.iter().position(|op| matches!(op, Op::Norm { .. }));
        let at = at.unwrap_or_else(|| panic!("a norm"));
        let Op::Norm { out, .. } = program.ops[at] else { unreachable!() };
        assert_eq!(feeds(&program)[at], Some(at + 1));
        let up = program.buffer("up", 1, program.buffers[out.0].columns);
        program.ops.insert(at + 2, Op::SiluGate { gate: out, up, out: up });
        assert_eq!(feeds(&program)[at], None);
    }

    #[test]
    fn a_rank_alone_adds_its_products_to_the_residual() {
        let alone = program(&[1]);
        for (at, (op, to)) in alone.ops.iter().zip(residuals(&alone)).enumerate() {
            let norm = match alone.ops.get(at + 2) {
                Some(Op::Norm { residual, .. }) => Some(*residual),
                _ => None,
            };
            assert_eq!(to, norm.filter(|_| matches!(op, Op::LinearParts { .. })), "op {at}");
        }
        let mut read = program(&[1]);
        let sums = residuals(&read);
        let first = sums.iter().position(Option::is_some).unwrap_or_else(|| panic!("a sum"));
        let Op::AllReduce { out, .. } = read.ops[first + 1] else { panic!("its sum") };
        read.ops.insert(first + 4, Op::SiluGate { gate: out, up: out, out });
        assert_eq!(residuals(&read)[first], None, "somebody else reads it");
    }

    #[test]
    fn a_sum_lies_where_its_only_part_does() {
        for (shares, is_alone) in [(&[1][..], true), (&[3, 1], false)] {
            let program = program(shares);
            let places = places(&program);
            let mut n_sums = 0;
            for two in program.ops.windows(2) {
                // The sum of looked-up rows is another's: the first residual is made of it.
                let [Op::LinearParts { .. }, Op::AllReduce { parts, out, .. }] = two else {
                    continue;
                };
                n_sums += 1;
                let is_one = program.buffers[parts.0].n_parts == 1;
                assert_eq!(places[parts.0] == out.0, is_one, "{shares:?}");
                assert!(is_one || !is_alone, "a rank alone has one part");
                assert_eq!(places[out.0], out.0);
            }
            assert!(n_sums > 0);
        }
    }
}
