// A shift layer: one weight a cycle, no multiplier. The number formats are those of docs/hardware.md.

// acc <= acc ± (x << (e - 1)); a code is sign, then e; e = 0 adds nothing.
module shift_accumulate #(
    parameter X_BITS = 8, CODE_BITS = 5, ACC_BITS = 32
) (
    input clk,
    input load,
    input signed [ACC_BITS-1:0] bias,
    input signed [X_BITS-1:0] x,
    input [CODE_BITS-1:0] code,
    output reg signed [ACC_BITS-1:0] acc
);
    wire [CODE_BITS-2:0] e = code[CODE_BITS-2:0];
    wire signed [ACC_BITS-1:0] wide = x;
    wire signed [ACC_BITS-1:0] shifted = wide <<< (e - 1'b1);
    wire signed [ACC_BITS-1:0] term = (e == 0) ? {ACC_BITS{1'b0}} : shifted;

    always @(posedge clk)
        if (load) acc <= bias;
        else if (code[CODE_BITS-1]) acc <= acc - term;
        else acc <= acc + term;
endmodule

// y = acc·2^-shift, rounded to nearest with halves up, saturated to Y_BITS.
module rescale #(
    parameter ACC_BITS = 32, SHIFT_BITS = 8, Y_BITS = 16
) (
    input signed [ACC_BITS-1:0] acc,
    input signed [SHIFT_BITS-1:0] shift,
    output signed [Y_BITS-1:0] y
);
    localparam signed [ACC_BITS-1:0] ONE = 1;
    localparam signed [ACC_BITS-1:0] HIGH = (ONE <<< (Y_BITS - 1)) - ONE;
    localparam signed [ACC_BITS-1:0] LOW = -(ONE <<< (Y_BITS - 1));

    wire signed [ACC_BITS-1:0] half = (shift > 0) ? (ONE <<< (shift - 1)) : {ACC_BITS{1'b0}};
    wire signed [ACC_BITS-1:0] rounded = acc + half;
    wire signed [ACC_BITS-1:0] right = rounded >>> shift;
    wire signed [ACC_BITS-1:0] left = acc <<< (-shift);
    wire signed [ACC_BITS-1:0] scaled = (shift > 0) ? right : left;

    assign y = (scaled > HIGH) ? HIGH[Y_BITS-1:0] : (scaled < LOW) ? LOW[Y_BITS-1:0] : scaled[Y_BITS-1:0];
endmodule
