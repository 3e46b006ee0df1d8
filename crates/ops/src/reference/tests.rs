//! The reference by hand.

use super::*;

/// Attention over two slots, by hand: q.k = 0 and ln 3 after scaling, so the weights are 1/4 and 3/4.
#[test]
fn attention_by_hand() {
    let mut b = Reference::default();
    let heads = HeadShape { q_heads: 1, kv_heads: 1, head_dim: 2 };
    let geometry = KvGeometry { num_layers: 1, kv_heads: 1, head_dim: 2, page_tokens: 8, dtype: DType::F32 };
    let mut kv = b.kv(geometry, 1, 0, None).unwrap();
    let (mut k, mut v) = (vec![0.0; 16], vec![0.0; 16]);
    k[2] = 3f32.ln() * 2f32.sqrt();
    (v[0], v[3]) = (4.0, 8.0);
    b.write_page(&mut kv, 0, BlockIndex(0), 0, &k, &v);
    let mut qkv = b.tensor(1, 6).unwrap();
    b.upload(&mut qkv, &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let mut out = b.tensor(1, 2).unwrap();
    let sequence = crate::SequenceRows {
        rows: 0..1,
        first_position: 1,
        prompt_len: 1,
        blocks: 0..1,
        attention: Default::default(),
        seat: SeatIndex(0),
        quota: 0,
    };
    let batch = Batch {
        tokens: &[0],
        positions: &[1],
        sequences: &[sequence],
        block_tables: &[BlockIndex(0)],
        methods: &[],
    };
    b.attend(&mut out, None, &kv, 0, &qkv, heads, None, &batch, None, 0);
    assert!((out.row(0)[0] - 1.0).abs() < 1e-6 && (out.row(0)[1] - 6.0).abs() < 1e-6, "{:?}", out.row(0));
    b.attend(&mut out, None, &kv, 0, &qkv, heads, Some(1), &batch, None, 0);
    assert_eq!(out.row(0), [0.0, 8.0]);
}

/// Rotation keeps the length of a head, and q.k depends on the distance of positions only.
#[test]
fn rotation_is_relative() {
    let mut b = Reference::default();
    let mut angles = b.tensor(4, 4).unwrap();
    b.rope_angles(&mut angles, &[3, 5, 10, 12], &[1.0, 0.1], &[0; 4], 1.0);
    let at = |row: usize, x: [f32; 4]| {
        let mut rotated = x;
        rotate(&mut rotated, angles.row(row));
        rotated
    };
    let (q, k) = ([0.3, -1.0, 0.7, 0.2], [1.0, 0.5, -0.4, 0.9]);
    let near = dot(&at(0, q), &at(1, k));
    let far = dot(&at(2, q), &at(3, k));
    assert!((near - far).abs() < 1e-5, "{near} {far}");
    let (after, before) = (dot(&at(2, q), &at(2, q)), dot(&q, &q));
    assert!((after - before).abs() < 1e-5, "{after} {before}");
}

#[test]
fn swiglu_and_norm_by_hand() {
    let mut b = Reference::default();
    let (mut out, mut x) = (b.tensor(1, 1).unwrap(), b.tensor(1, 2).unwrap());
    b.upload(&mut x, &[2.0, 3.0]);
    b.swiglu(&mut out, &x);
    assert!((out.row(0)[0] - 6.0 / (1.0 + (-2f32).exp())).abs() < 1e-6);
    let mut normed = b.tensor(1, 2).unwrap();
    b.rms_norm(&mut normed, &x, &vec![1.0, 2.0], 0.0);
    let rms = (6.5f32).sqrt();
    assert!((normed.row(0)[0] - 2.0 / rms).abs() < 1e-6 && (normed.row(0)[1] - 6.0 / rms).abs() < 1e-6);
}
