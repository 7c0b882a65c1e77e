// A product with a binary code: one row a cycle is added, left out, or (for ±1 codes) subtracted. No multiplier, no shifter.
module mat_add #(
    parameter VALUE_BITS = 8, ACC_BITS = 16, PLUS_MINUS = 0
) (
    input clk,
    input clear,
    input code,
    input signed [VALUE_BITS-1:0] value,
    output reg signed [ACC_BITS-1:0] acc
);
    wire signed [ACC_BITS-1:0] wide = value;

    always @(posedge clk)
        if (clear) acc <= {ACC_BITS{1'b0}};
        else if (code) acc <= acc + wide;
        else if (PLUS_MINUS) acc <= acc - wide;
endmodule
