use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use ops::reference::Reference;
use ops::sparse::{Attention, Method, Score, SelectionLimits, bitmap_words, mark};
use ops::{Backend, Batch, BlockIndex, HeadShape, Random, SequenceRows};

use super::*;

const SEEDS: u64 = 40;

fn header(random: &mut Random) -> Header {
    Header {
        num_layers: 1 + random.below(5) as u32,
        kv_heads: 1 + random.below(4) as u32,
        page_tokens: [1, 8, 16, 64][random.below(4)],
        note: ["", "demo model, quest, Budget 256 ≤ n"][random.below(2)].into(),
    }
}

fn records(header: &Header, random: &mut Random) -> Vec<Record> {
    let mut records = Vec::new();
    let mut step = 0;
    for _ in 0..random.below(6) {
        step += 1 + (random.below(3) as u64) * 1_000_000_007;
        for layer in 0..header.num_layers {
            if random.below(4) == 0 {
                continue;
            }
            let rows = (0..random.below(4)).map(|_| row(header, random)).collect();
            records.push(Record { step, layer, rows });
        }
    }
    records
}

fn row(header: &Header, random: &mut Random) -> RowSelection {
    let context_max = [40, 5000, 1 << 31][random.below(3)];
    let position = random.below(context_max) as u32;
    let heads = (0..header.kv_heads).map(|_| {
        let last = (position / header.page_tokens) as usize;
        let mut pages: Vec<u32> =
            (0..random.below(50)).map(|_| random.below(last + 1) as u32).chain([last as u32]).collect();
        pages.sort_unstable();
        pages.dedup();
        let room = pages.len() * (header.page_tokens as usize - 1);
        HeadSelection { tokens: (pages.len() + random.below(room + 1)) as u32, pages }
    });
    let heads = heads.collect();
    let prompt_tokens = random.below(position as usize + 1) as u32;
    RowSelection {
        request: random.next_u64(),
        prompt_tokens,
        position,
        budget: random.next_u64() as u32,
        heads,
    }
}

fn written(header: &Header, records: &[Record]) -> Vec<u8> {
    let mut writer = TraceWriter::new(Vec::new(), header).unwrap();
    let mut bytes = Vec::new();
    records.iter().for_each(|record| writer.write(record).unwrap());
    std::mem::swap(&mut bytes, writer.inner());
    bytes
}

fn read(bytes: &[u8]) -> Result<(Header, Vec<Record>), TraceError> {
    let mut reader = TraceReader::new(bytes)?;
    let mut records = Vec::new();
    while let Some(record) = reader.read()? {
        records.push(record);
    }
    Ok((reader.header().clone(), records))
}

#[test]
fn what_is_written_is_read() {
    for seed in 0..SEEDS {
        let mut random = Random::new(seed);
        let header = header(&mut random);
        let records = records(&header, &mut random);
        let bytes = written(&header, &records);
        assert_eq!(read(&bytes).unwrap(), (header, records), "seed {seed}");
    }
}

#[test]
fn a_trace_that_is_cut_off_says_where() {
    for seed in 0..SEEDS / 4 {
        let mut random = Random::new(seed);
        let header = header(&mut random);
        let records = records(&header, &mut random);
        let bytes = written(&header, &records);
        // Where a whole number of records ends.
        let ends: Vec<usize> = (0..=records.len()).map(|n| written(&header, &records[..n]).len()).collect();
        for length in 0..bytes.len() {
            let found = read(&bytes[..length]);
            match (length, ends.iter().position(|&end| end == length)) {
                (_, Some(n)) => assert_eq!(found.unwrap().1, records[..n], "seed {seed}"),
                (0..12, _) => assert!(matches!(found, Err(TraceError::NotATrace)), "seed {seed}"),
                _ => {
                    let Err(TraceError::CutOff { records, at, whole }) = found else {
                        panic!("seed {seed}, {length} bytes: {found:?}")
                    };
                    let before = ends.iter().filter(|&&end| end <= length).count();
                    assert_eq!(
                        (records as usize, at as usize),
                        (before.saturating_sub(1), length),
                        "seed {seed}"
                    );
                    assert_eq!(
                        whole as usize,
                        if before == 0 { 12 } else { ends[before - 1] },
                        "seed {seed}"
                    );
                }
            }
        }
    }
}

#[test]
fn damage_is_found() {
    for seed in 0..SEEDS {
        let mut random = Random::new(seed);
        let header = header(&mut random);
        let records = records(&header, &mut random);
        let bytes = written(&header, &records);
        for _ in 0..200 {
            let mut damaged = bytes.clone();
            let at = random.below(bytes.len());
            damaged[at] ^= 1 << random.below(8);
            let found = read(&damaged);
            assert!(found.is_err(), "seed {seed}, byte {at}");
            assert!(!found.unwrap_err().to_string().contains('\n'), "one line");
        }
        let noise: Vec<u8> = (0..200).map(|_| random.next_u64() as u8).collect();
        assert!(matches!(read(&noise), Err(TraceError::NotATrace)), "seed {seed}");
    }
}

/// Frames whose checksums are right and whose payloads are not: nothing may panic, and nothing may take memory that the
/// bytes at hand do not account for.
#[test]
fn false_payloads_are_refused() {
    let plain = Header { num_layers: 2, kv_heads: 2, page_tokens: 16, note: String::new() };
    let start = written(&plain, &[]);
    let framed = |payload: &[u8]| {
        let length = (payload.len() as u32).to_le_bytes();
        [&start[..], &length, payload, &checksum(payload).to_le_bytes()].concat()
    };
    let huge = [0xff, 0xff, 0xff, 0xff, 0x0f];
    for (payload, what) in [
        (&[][..], "it ends within a number"),
        (&[0, 2], "no such layer"),
        (&[0, 0, 5, 9, 8, 7], "a token of a prompt"),
        (&[0, 0, 5, 9, 9, 7], "it ends within a number"),
        (&[&[0, 0, 5, 9, 9, 7, 1][..], &huge].concat(), "more pages than it has"),
        (&[0, 0, 5, 9, 9, 7, 1, 1, 1, 0, 0], "beyond the context"),
        (&[0, 0, 5, 9, 9, 7, 17, 1, 0, 0, 0], "do not lie in so many pages"),
        (&[0, 0, 5, 9, 9, 7, 0, 1, 0, 0, 0], "do not lie in so many pages"),
        (&[0xff; 10], "out of range"),
        (&[&[0][..], &[0xff; 9], &[1]].concat(), "out of range"),
    ] {
        let error = read(&framed(payload)).unwrap_err().to_string();
        assert!(error.contains(what) && error.contains("byte 23"), "{what}: {error}");
    }
    let twice = [framed(&[1, 0]), framed(&[1, 0])[start.len()..].to_vec()].concat();
    assert!(read(&twice).unwrap_err().to_string().contains("does not follow"));
    let long = [&start[..], &u32::MAX.to_le_bytes(), &[0; 8]].concat();
    assert!(read(&long).unwrap_err().to_string().contains("longer than any"));
    for seed in 0..SEEDS {
        let mut random = Random::new(seed);
        let payload: Vec<u8> = (0..random.below(60)).map(|_| random.below(20) as u8).collect();
        // Whatever it is, it is read or refused.
        let _ = read(&framed(&payload));
    }
    let mut other = start;
    other[8] = 2;
    assert!(matches!(read(&other), Err(TraceError::Version { found: 2 })));
}

const PAGE_TOKENS: usize = 8;
const HEADS: HeadShape = HeadShape { q_heads: 2, kv_heads: 2, head_dim: 32 };

fn method() -> Method {
    ops::conformance::method(4, Score::Random { seed: 1 })
}

/// Prompt, first position, rows, block table.
type Part<'a> = (u32, u32, u32, &'a [u32]);

/// Records a step in which every row selects everything before it in its own block, and nothing of the block before in
/// layer 1.
fn step(recorder: &mut Recorder, parts: &[Part]) {
    let mut backend = Reference::default();
    let (mut sequences, mut tables, mut positions) = (Vec::new(), Vec::new(), Vec::new());
    for &(prompt_len, first_position, rows, table) in parts {
        let (row, block) = (positions.len() as u32, tables.len() as u32);
        positions.extend(first_position..first_position + rows);
        tables.extend(table.iter().map(|&b| BlockIndex(b)));
        sequences.push(SequenceRows {
            rows: row..row + rows,
            first_position,
            prompt_len,
            blocks: block..block + table.len() as u32,
            attention: Attention::Sparse { method: 0, budget: 9 },
            seat: ops::SeatIndex(0),
            quota: 0,
        });
    }
    let methods = [method()];
    let tokens = vec![0; positions.len()];
    let batch = Batch {
        tokens: &tokens,
        positions: &positions,
        sequences: &sequences,
        block_tables: &tables,
        methods: &methods,
    };
    let limits = SelectionLimits::new(&methods, HEADS, PAGE_TOKENS, positions.len(), 64);
    let (mut selection, _) = backend.selection(limits).unwrap();
    for layer in 0..2 {
        for (place, row) in batch.sparse_rows().enumerate() {
            for head in 0..HEADS.kv_heads {
                let mut bits = vec![0; bitmap_words(row.position + 1)];
                mark(&mut bits, row.position / PAGE_TOKENS * PAGE_TOKENS..row.position + 1);
                if layer == 0 {
                    mark(&mut bits, 0..1 + head);
                }
                backend.write_selection(&mut selection, place, head, &bits);
            }
        }
        recorder.record(&mut backend, &selection, layer, &batch);
    }
}

/// A file in memory that takes so many bytes.
#[derive(Clone, Default)]
struct Disk(Arc<Mutex<Vec<u8>>>, Option<usize>);

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut held = self.0.lock().unwrap();
        if self.1.is_some_and(|most| held.len() + bytes.len() > most) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        held.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn recorder(disk: &Disk, complaints: &Arc<AtomicUsize>) -> Recorder {
    let complaints = complaints.clone();
    let complain = move |_| {
        complaints.fetch_add(1, Ordering::Relaxed);
    };
    let header = Header { num_layers: 2, kv_heads: 2, page_tokens: PAGE_TOKENS as u32, note: "test".into() };
    Recorder::new(Box::new(disk.clone()), &header, Box::new(complain)).unwrap()
}

#[test]
fn requests_are_told_apart_by_continuity() {
    let (disk, complaints) = (Disk::default(), Arc::default());
    let mut recorder = recorder(&disk, &complaints);
    // Two that share block 0, prompt length and steps; one leaves, another takes its block; the first is preempted and runs
    // three tokens at once in other blocks.
    let steps: [&[Part]; 5] = [
        &[(15, 15, 1, &[0, 1]), (15, 15, 1, &[0, 2])],
        &[(15, 16, 1, &[0, 1, 3]), (15, 16, 1, &[0, 2, 4])],
        &[(15, 15, 1, &[0, 4]), (15, 17, 1, &[0, 1, 3])],
        &[(15, 14, 4, &[0, 5, 6]), (15, 16, 1, &[0, 4, 7])],
        &[(15, 18, 1, &[0, 5, 6])],
    ];
    steps.iter().for_each(|parts| step(&mut recorder, parts));
    drop(recorder);
    let (_, records) = read(&disk.0.lock().unwrap()).unwrap();
    let seen: Vec<Vec<(u64, u32)>> =
        records.iter().map(|r| r.rows.iter().map(|row| (row.request, row.position)).collect()).collect();
    let expected: [&[(u64, u32)]; 5] = [
        &[(0, 15), (1, 15)],
        &[(0, 16), (1, 16)],
        &[(2, 15), (0, 17)],
        &[(3, 15), (3, 16), (3, 17), (2, 16)],
        &[(3, 18)],
    ];
    assert_eq!(seen, expected.iter().flat_map(|rows| [rows.to_vec(), rows.to_vec()]).collect::<Vec<_>>());
    let places: Vec<(u64, u32)> = records.iter().map(|r| (r.step, r.layer)).collect();
    assert_eq!(places[..4], [(0, 0), (0, 1), (1, 0), (1, 1)]);
    assert_eq!(records[2].rows[0].heads[1], HeadSelection { tokens: 3, pages: vec![0, 2] });
    assert_eq!(records[3].rows[0].heads[1], HeadSelection { tokens: 1, pages: vec![2] });
    assert_eq!((records[2].rows[0].prompt_tokens, records[2].rows[0].budget), (15, 9));
    assert_eq!(complaints.load(Ordering::Relaxed), 0);
}

#[test]
fn a_full_disk_ends_the_recording_once() {
    let (disk, complaints) = (Disk(Arc::default(), Some(150)), Arc::default());
    let mut recorder = recorder(&disk, &complaints);
    for position in 15..60 {
        step(&mut recorder, &[(15, position, 1, &[0, 1, 2, 3, 4, 5, 6, 7])]);
    }
    drop(recorder);
    assert_eq!(complaints.load(Ordering::Relaxed), 1);
    // What was written before is whole.
    assert!(!read(&disk.0.lock().unwrap()).unwrap().1.is_empty());
}
